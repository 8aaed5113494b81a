"""Ends a run that has lost one of its processes, and names the process and the reason.

verl's trainers wait without limit for the results of such a process: the replay buffer for samples
of a dead agent loop (verl/trainer/ppo/v1/replay_buffer.py, ``sample`` and ``wait_for_sampleable``),
TransferQueue's clients for their controller (transfer_queue/client.py, whose socket pool has no
timeout), a rank for its peers. A dead reward worker is worse than a wait: its samples fail, and the
run continues without them. All of these processes are Ray actors of the driver's job, so one thread
of the driver asks Ray's control store (GCS) for dead actors. A request takes about a millisecond.
"""

from __future__ import annotations

import atexit
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

LOOK_SECONDS = 2.0
"""Time between two requests."""

FAILED_LOOKS = 30
"""The watch ends after so many failed requests in a row: a minute, after which Ray's own processes
end as well (``gcs_rpc_server_reconnect_timeout_s`` of ray_config_def.h).
"""

GRACE_SECONDS = 20.0
"""How long verl may take to end the run with an error of its own."""

OF_THE_RUN = ("verl", "transfer_queue", "vllm", "qerl_verl")
"""Packages whose actors a run cannot go on without. verl restarts none of them. An actor of another
package is the user's, whose code may expect its loss."""

MEMORY_ADVICE = (
    "the memory of that host is short: start fewer runs side by side on it, or fewer processes in "
    "each (actor_rollout_ref.rollout.agent.num_workers, reward.num_workers, "
    "data.dataloader_num_workers, transfer_queue.backend.SimpleStorage.num_data_storage_units); "
    "`qerl plan` says what a run takes"
)

_INTENDED = ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED", "OWNER_DIED")
"""Ray's reasons for an intended end: verl has ended the actor, or its owner has ended."""

_INTENDED_EXIT = re.compile(r"exit type: INTENDED_")
"""Found in Ray's message about a worker that ended by itself (``exit_actor``, exit code 0)."""

_ABRUPT = "connection error code"
"""Found in Ray's message about a process whose connection broke off."""


@dataclass(frozen=True)
class LostProcess:
    """An actor of the run that ended without intent.

    Attributes:
        name: class, actor's name, process and address.
        reason: why it ended, as far as Ray knows.
        memory: whether Ray ended it because its node was short of memory.
        started: whether its constructor had returned before it ended.
        ended: time of its end, in milliseconds since 1970.
    """

    name: str
    reason: str
    memory: bool = False
    started: bool = True
    ended: int = 0

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def read_actor(actor, of_the_run: Iterable[str] = OF_THE_RUN) -> LostProcess | None:
    """Returns the loss that Ray's record of a dead actor describes; None if the actor was ended on
    purpose or is the user's.

    Args:
        actor: ``ActorTableData`` of gcs.proto.
        of_the_run: packages whose actors the run needs.
    """
    if actor.function_descriptor.python_function_descriptor.module_name.partition(".")[0] not in of_the_run:
        return None
    cause = actor.death_cause
    kind = cause.WhichOneof("context")
    memory = kind == "oom_context"
    if kind == "actor_died_error_context":
        died = cause.actor_died_error_context
        message = died.error_message
        if died.Reason.Name(died.reason) in _INTENDED or _INTENDED_EXIT.search(message):
            return None
        reason = _say_death(message)
    elif memory:
        reason = _say_memory(cause.oom_context.error_message)
    elif kind == "creation_task_failure_context":
        reason = _last_line(cause.creation_task_failure_context.formatted_exception_string)
    elif kind is None:
        reason = "Ray gives no reason"
    else:
        reason = _one_line(getattr(cause, kind).error_message)
    name = f"{actor.class_name.rpartition('.')[2]} {actor.name}".strip()
    return LostProcess(
        name=f"{name} (process {actor.pid} on {actor.address.ip_address})",
        reason=reason,
        memory=memory,
        started=kind in ("actor_died_error_context", "oom_context", None),
        ended=actor.end_time,
    )


def _say_death(message: str) -> str:
    if _ABRUPT in message:
        return (
            "it ended abruptly, as after SIGKILL or a segmentation fault; the kernel's OOM killer "
            "ends processes so (`dmesg` on that host names them)"
        )
    return _one_line(message.rpartition("Worker exit detail: ")[2])


def _say_memory(message: str) -> str:
    """Shortens Ray's message about memory, several thousand characters long, to its first sentences
    and the largest processes.
    """
    first = _one_line(message.partition("\n")[0])
    _, _, table = message.partition("COMMAND\n")
    largest = []
    for row in table.splitlines()[:3]:
        pid, gigabytes, command = (*row.split("\t"), "", "")[:3]
        if command:
            largest.append(f"{gigabytes} GB {command} ({pid})")
    return f"{first}; the largest processes there: {', '.join(largest)}" if largest else first


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return _one_line(lines[-1]) if lines else "Ray gives no reason"


def _one_line(text: str, length: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}..."


@dataclass
class ProcessWatch:
    """Looks for lost processes, beginning when Ray has started.

    Attributes:
        list_lost: returns the losses that Ray knows of.
        end_run: ends the actors that this process has created.
        say: called with each line for the user.
        lost: losses found so far.
    """

    list_lost: Callable[[], list[LostProcess]]
    end_run: Callable[[], None]
    say: Callable[[str], None]
    lost: list[LostProcess] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _over: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> None:
        """Starts the thread; called when Ray has started."""
        atexit.register(self._over.set)  # comes before Ray's own end
        threading.Thread(target=self._run, name="qerl processes", daemon=True).start()

    def _run(self) -> None:
        failed = 0
        while True:
            try:
                if self.look():
                    break
                failed = 0
            except Exception as error:  # Ray is ending, or this driver is a client of another one
                failed += 1
                if failed == FAILED_LOOKS:
                    self.say(
                        f"Ray does not tell which processes are lost: {type(error).__name__}: {_one_line(str(error))}"
                    )
                    return
            if self._over.wait(LOOK_SECONDS):
                return
        if self._over.wait(GRACE_SECONDS):
            return
        self.say(f"verl goes on waiting {GRACE_SECONDS:.0f} s after the loss, so the run is ended")
        try:
            self.end_run()
        except Exception as error:
            self.say(
                f"the run could not be ended ({type(error).__name__}: {_one_line(str(error))}); end it by a signal"
            )

    def look(self) -> list[LostProcess]:
        """Asks Ray, and returns :attr:`lost`. Reports each loss once, in the order in which they
        happened.
        """
        with self._lock:
            for process in sorted(self.list_lost(), key=lambda process: process.ended):
                if process in self.lost:
                    continue
                what = "the run has lost a process" if process.started else "a process of the run did not start"
                self.say(f"{what}: {process}")
                if process.memory and not any(other.memory for other in self.lost):
                    self.say(MEMORY_ADVICE)
                self.lost.append(process)
            return list(self.lost)

    def end(self, failed: bool) -> list[LostProcess]:
        """Stops the watch at the end of the run, and returns the losses.

        Args:
            failed: whether the run ended with an error, which a loss may have caused.
        """
        self._over.set()
        if failed:
            try:
                return self.look()
            except Exception:  # Ray has ended
                pass
        return list(self.lost)


def watch_processes(say: Callable[[str], None]) -> ProcessWatch | None:
    """Returns a watch that begins when this process has started or joined Ray; None if this version
    of Ray calls no hooks after ``ray.init`` (ray/_private/worker.py, ``_post_init_hooks``).
    """
    from ray._private import worker

    hooks = getattr(worker, "_post_init_hooks", None)
    if not isinstance(hooks, list):
        return None
    watch = ProcessWatch(_list_lost, _end_own_actors, say)
    hooks.append(watch.begin)
    return watch


def _actors(state: str) -> list:
    """Returns the records of this job's actors in a state, from the control store.
    ``ray.util.state`` asks the dashboard, which may not run, and ``ray.state.actors`` omits the
    class's module.
    """
    from ray._private.state import state as global_state
    from ray._private.worker import global_worker
    from ray.core.generated.gcs_pb2 import ActorTableData

    global_worker.check_connected()  # ray.get_runtime_context would start Ray again after its end
    records = global_state._connect_and_get_accessor().get_actor_table(global_worker.current_job_id, state)
    return [ActorTableData.FromString(record) for record in records]


def _list_lost() -> list[LostProcess]:
    return [lost for actor in _actors("DEAD") if (lost := read_actor(actor)) is not None]


def _end_own_actors() -> None:
    """Ends the actors that this process has created. verl's driver creates one, and all others end
    with it. The driver's ``ray.get`` then raises ActorDiedError.
    """
    import ray
    from ray._private.worker import global_worker

    for actor in _actors("ALIVE"):
        if actor.owner_address.worker_id == global_worker.worker_id:
            global_worker.core_worker.kill_actor(ray.ActorID(actor.actor_id), True)
