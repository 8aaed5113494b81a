"""Tests that a run that loses one of its processes ends and names it."""

import os
import signal
import threading
import time

import pytest
import ray
from ray._private import worker
from ray.core.generated.common_pb2 import ActorDeathCause, ActorDiedErrorContext
from ray.core.generated.gcs_pb2 import ActorTableData

from qerl_verl.platform import lost_processes
from qerl_verl.platform.lost_processes import MEMORY_ADVICE, LostProcess, ProcessWatch, read_actor, watch_processes

MEMORY = (
    "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.1, ID: 9e) was "
    "190.65GB used / 200.00GB limit (0.953250)\nOOM kill reason: ...\nTop 10 memory users: PID\tMEM(GB)\tCOMMAND\n"
    "11\t40.55\tray::WorkerDict\n12\t30.39\tVLLM::EngineCore\nRefer to the documentation on how to"
)
WORKER = "The actor is dead because its worker process has died. Worker exit type: "


def died(reason: str, message: str = "") -> ActorDeathCause:
    number = ActorDiedErrorContext.Reason.Value(reason)
    return ActorDeathCause(actor_died_error_context=ActorDiedErrorContext(reason=number, error_message=message))


def actor(cause: ActorDeathCause, module: str = "verl.trainer.ppo.v1.agent_loop_tq") -> ActorTableData:
    made = ActorTableData(class_name="make.<locals>.AgentLoopWorkerTQ", name="loop_3", pid=7, death_cause=cause)
    made.address.ip_address = "10.0.0.1"
    made.function_descriptor.python_function_descriptor.module_name = module
    return made


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (died("RAY_KILL"), None),
        (died("OUT_OF_SCOPE"), None),
        (died("REF_DELETED"), None),
        (died("OWNER_DIED"), None),
        (died("WORKER_DIED", f"{WORKER}INTENDED_USER_EXIT Worker exit detail: User requested to exit"), None),
        (died("WORKER_DIED", f"{WORKER}INTENDED_SYSTEM_EXIT Worker exit detail: job finished"), None),
        (died("WORKER_DIED", f"{WORKER}SYSTEM_ERROR Worker exit detail: connection error code 2. End of file."), "dmesg"),
        (died("WORKER_DIED", f"{WORKER}SYSTEM_ERROR Worker exit detail: It receives\na SIGTERM."), "It receives a SIGTERM."),
        (died("NODE_DIED", "The actor died because its node has died."), "its node has died"),
        (ActorDeathCause(creation_task_failure_context={"formatted_exception_string": "a\nValueError: bad\n"}),
         "ValueError: bad"),
        (ActorDeathCause(runtime_env_failed_context={"error_message": "no such folder"}), "no such folder"),
        (ActorDeathCause(actor_unschedulable_context={"error_message": "no GPU"}), "no GPU"),
        (ActorDeathCause(oom_context={"error_message": MEMORY}), "190.65GB used / 200.00GB limit"),
        (ActorDeathCause(oom_context={"error_message": MEMORY}), "40.55 GB ray::WorkerDict (11), 30.39 GB VLLM::EngineCore"),
        (ActorDeathCause(oom_context={"error_message": "short of memory"}), "short of memory"),
        (ActorDeathCause(), "Ray gives no reason"),
    ],
)  # fmt: skip
def test_what_ray_records_of_a_death_is_a_loss_or_not(cause, reason):
    lost = read_actor(actor(cause))
    if reason is None:
        assert lost is None
    else:
        assert lost.name == "AgentLoopWorkerTQ loop_3 (process 7 on 10.0.0.1)" and reason in lost.reason
        assert lost.memory == cause.HasField("oom_context") and "\n" not in lost.reason
        assert lost.started == (reason not in ("ValueError: bad", "no such folder", "no GPU"))


@pytest.mark.parametrize(
    ("module", "needed"),
    [("verl.single_controller.ray.base", True), ("transfer_queue.controller", True), ("qerl_verl.rollout.server", True),
     ("vllm.v1.executor.ray_utils", True), ("sandbox", False), ("verl_sandbox.actors", False)],
)  # fmt: skip
def test_an_actor_of_the_users_own_is_not_one_that_the_run_needs(module, needed):
    assert (read_actor(actor(died("WORKER_DIED"), module)) is not None) is needed


LOST = LostProcess("AgentLoopWorkerTQ", "SIGKILL", ended=3)
SHORT = LostProcess("RewardLoopWorker", "short of memory", memory=True, ended=2)
FAILED = LostProcess("WorkerDict", "ValueError: bad", started=False, ended=1)


def watch(lost: list[LostProcess]) -> tuple[ProcessWatch, list[str], list[bool]]:
    lines, ends = [], []
    return ProcessWatch(lambda: lost, lambda: ends.append(True), lines.append), lines, ends


def test_each_loss_is_said_once_with_what_to_change():
    known = []
    made, lines, _ = watch(known)
    assert made.look() == [] and lines == []
    known += [LOST, SHORT, FAILED, LostProcess("WorkerDict", "short of memory", memory=True, ended=4)]
    assert [lost.ended for lost in made.look()] == [1, 2, 3, 4]
    assert made.look() == made.end(failed=True) and len(lines) == 5
    assert lines[0] == "a process of the run did not start: WorkerDict: ValueError: bad"
    assert lines[1:3] == ["the run has lost a process: RewardLoopWorker: short of memory", MEMORY_ADVICE]


@pytest.mark.parametrize(
    ("lost", "verl_ends", "ended"), [([LOST], False, True), ([LOST], True, False), ([], False, False)]
)
def test_a_run_that_verl_does_not_end_itself_is_ended(monkeypatch, lost, verl_ends, ended):
    monkeypatch.setattr(lost_processes, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(lost_processes, "GRACE_SECONDS", 0.3)
    made, lines, ends = watch(lost)
    threading.Timer(0.1, lambda: verl_ends and made.end(failed=True)).start()
    made.begin()
    time.sleep(0.6)
    made.end(failed=False)
    assert bool(ends) is ended and bool(lines) is bool(lost)


def test_a_control_store_that_does_not_answer_for_long_is_said(monkeypatch):
    monkeypatch.setattr(lost_processes, "LOOK_SECONDS", 0.001)

    def fail():
        raise RuntimeError("no connection")

    lines = []
    made = ProcessWatch(fail, fail, lines.append)
    made._run()
    assert lines == ["Ray does not tell which processes are lost: RuntimeError: no connection"]
    assert made.end(failed=True) == []


def test_the_watch_begins_when_ray_is_up(monkeypatch):
    monkeypatch.setattr(worker, "_post_init_hooks", hooks := [])
    made = watch_processes(print)
    assert hooks == [made.begin]
    monkeypatch.delattr(worker, "_post_init_hooks")
    assert watch_processes(print) is None


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(worker, "_post_init_hooks", [])
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, address="local")
    yield
    ray.shutdown()


def test_with_ray_a_killed_process_ends_the_driver_and_what_is_ended_on_purpose_does_not(cluster, monkeypatch):
    """The shape of a run: the driver waits for one actor, which has made the others."""
    monkeypatch.setattr(lost_processes, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lost_processes, "GRACE_SECONDS", 0.5)
    lines = []
    made = watch_processes(lines.append)
    made.begin()

    class Worker:
        def process(self):
            return os.getpid()

        def leave(self):
            ray.actor.exit_actor()

    class Runner:
        def __init__(self, worker_class):
            self.workers = {name: worker_class.options(name=name).remote() for name in ("kill", "leave", "loop")}
            ray.get([w.process.remote() for w in self.workers.values()])

        def process_of_loop(self):
            ray.kill(self.workers["kill"])
            self.workers["leave"].leave.remote()
            return ray.get(self.workers["loop"].process.remote())

        def run(self):
            time.sleep(600)  # as the replay buffer

    for made_class in (Worker, Runner):
        made_class.__module__ = "verl.trainer"  # before Ray reads it
    remote = ray.remote(num_cpus=0)
    runner = remote(Runner).remote(remote(Worker))
    process = ray.get(runner.process_of_loop.remote())
    end = time.monotonic() + 30
    while len(lost_processes._actors("DEAD")) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)  # looks in between
    assert lines == [] and len(lost_processes._actors("DEAD")) == 2
    waiting = runner.run.remote()
    os.kill(process, signal.SIGKILL)
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(waiting, timeout=60)
    (lost,) = made.end(failed=True)
    assert lost.name.startswith(f"Worker loop (process {process} on ") and "SIGKILL" in lost.reason
    assert lines[0] == f"the run has lost a process: {lost}" and "is ended" in lines[1]
