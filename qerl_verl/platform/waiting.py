"""Reports what a run waits for while Ray lacks resources that verl reserves.

verl and TransferQueue wait without limit and without a message for placement groups and actors that
Ray cannot place. The resources that a run reserves are known (:mod:`qerl_verl.config.reserved`), so
a thread of the driver compares them with those of the cluster.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Mapping, Sequence

LOOK_SECONDS = 15.0
"""Between two looks."""

REMARK_SECONDS = 60.0
"""Between two lines about the same."""

SETTLED_LOOKS = 20
"""So many looks in a row without anything to wait for end the watch: five minutes, in which all
workers are placed."""


def start_watch(gpus: int, cpus: int, say: Callable[[str], None]) -> threading.Thread:
    """Starts to watch the run of this process when Ray has started.

    Args:
        gpus, cpus: what the run reserves.
        say: called with each line.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_watch, args=(gpus, cpus, say, stop), name="qerl resources", daemon=True)
    thread.start()
    atexit.register(_end, stop, thread)  # before Ray's own end, so that no look is under way then
    return thread


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    thread.join(2.0)


def _watch(gpus: int, cpus: int, say: Callable[[str], None], stop: threading.Event) -> None:
    import ray

    while not ray.is_initialized():
        if stop.wait(1.0):
            return
    settled, remarked, waiting = 0, -REMARK_SECONDS, False
    while settled < SETTLED_LOOKS:
        if stop.wait(LOOK_SECONDS):
            return
        try:
            line = describe(gpus, cpus, ray.cluster_resources(), ray.available_resources(), _groups())
        except Exception:  # Ray has been shut down, or its client does not offer the table: it only informs
            return
        settled = 0 if line else settled + 1
        # a group that is pending at one look is being placed; at two it waits
        if line and waiting and time.monotonic() - remarked >= REMARK_SECONDS:
            say(line)
            remarked = time.monotonic()
        waiting = bool(line)


def _groups() -> list[dict]:
    from ray.util import placement_group_table

    return list(placement_group_table().values())


def describe(
    gpus: int, cpus: int, total: Mapping[str, float], free: Mapping[str, float], groups: Sequence[Mapping]
) -> str:
    """Returns one line that says what the run waits for; empty if it waits for nothing.

    Args:
        gpus, cpus: what the run reserves.
        total: resources of all nodes (``ray.cluster_resources``).
        free: those that nothing holds (``ray.available_resources``).
        groups: Ray's placement groups (the values of ``ray.util.placement_group_table``).
    """
    needed = {"GPU": gpus, "CPU": cpus}
    missing = [
        f"{amount} {name}s and the cluster has {total.get(name, 0):g}"
        for name, amount in needed.items()
        if total.get(name, 0) < amount
    ]
    if missing:
        return f"waiting for resources: the run reserves {', '.join(missing)}; `ray status` shows who holds them"
    pending = [group for group in groups if group.get("state") in ("PENDING", "RESCHEDULING")]
    if not pending:
        return ""
    bundles = list(pending[0]["bundles"].values())
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in sorted(bundles[0].items()))
    where = " on one node" if pending[0].get("strategy") == "STRICT_PACK" and len(bundles) > 1 else ""
    held = ", ".join(f"{free.get(name, 0):g} of {total.get(name, 0):g} {name}s" for name in ("GPU", "CPU"))
    return (
        f"waiting for resources: {len(bundles)} times {wanted}{where} "
        f"({pending[0].get('name') or 'a placement group'}); free in the cluster are {held}; `ray "
        "status` shows who holds them"
    )
