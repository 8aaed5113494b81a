"""Chooses launch configurations by measuring them, once for each GPU model and weight shape.

A kernel package (:mod:`qerl_verl.kernels.hopper`, :mod:`qerl_verl.kernels.triton`) lists candidates
and provides a call for each. This module times the calls, and keeps the choice in a file, so that
every later process on the same kind of GPU, a resumed run included, launches the same kernels and
sums in the same order.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock

Candidate = TypeVar("Candidate", bound=Hashable)

ROTATE_BYTES = 96 << 20
"""Calls rotate through copies of a weight of this size together, so that none is read from the
L2 cache."""

MOST_COPIES = 64
"""The largest number of copies. Smaller weights would need more and are read from the L2 cache."""

FINALISTS = 3
"""How many of the fastest candidates of a first, short measurement are measured again."""

SWITCH = "QERL_KERNEL_TUNING"
"""Environment variable. ``off`` keeps the built-in table of launch configurations."""


def enabled() -> bool:
    """Returns whether launch configurations are measured on this machine."""
    return os.environ.get(SWITCH, "on").lower() not in ("off", "0", "false", "no")


def cache_folder() -> Path:
    """Returns ``$QERL_KERNEL_CACHE``, or ``~/.cache/qerl_verl/kernels``: compiled kernels and
    measured choices."""
    return Path(os.environ.get("QERL_KERNEL_CACHE") or Path.home() / ".cache" / "qerl_verl" / "kernels")


def recall(kind: str, device: int, version: str, problem: str, measure: Callable[[], list]) -> list:
    """Returns the choices for one problem: from the cache, else measured now and kept.

    Processes that ask for the same problem at the same time measure once: the others wait for the
    first. All of them return what the file holds, so the ranks of a job agree. Where the cache
    cannot be locked or written to, each process measures for itself.

    Args:
        kind: name of the kernels, for example ``hopper``.
        device: CUDA device number. The GPU's name and number of multiprocessors are part of the
            key.
        version: text that changes whenever kernels or candidates do.
        problem: the shape and everything else that the choice depends on; part of a file name.
        measure: returns the choices as JSON-serializable lists.

    Returns:
        The result of ``measure``, here or in another process.
    """
    properties = torch.cuda.get_device_properties(device)
    key = json.dumps([kind, properties.name, properties.multi_processor_count, version])
    model = re.sub(r"[^A-Za-z0-9]+", "-", properties.name).strip("-").lower()
    folder = cache_folder() / f"tuned-{kind}-{model}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    file = folder / f"{problem}.json"
    if (found := _read(file)) is not None:
        return found
    with _locked(folder / ".lock"):
        if (found := _read(file)) is not None:
            return found
        choices = json.loads(json.dumps(measure()))
        _write_first(file, choices)
    return _read(file) or choices


def choices(
    kind: str, device: int, version: str, problem: str, measure: Callable[[], list]
) -> tuple[list | None, str | None]:
    """Runs :func:`recall` for the layers of a model, with the measurement in a thread of its own.

    Args:
        kind, device, version, problem, measure: see :func:`recall`.

    Returns:
        The choices, and a sentence if something was measured. If there is no memory to measure in,
        None and a sentence that says so.
    """
    seconds = []

    def timed() -> list:
        start = time.monotonic()
        found = in_thread(measure)
        seconds.append(time.monotonic() - start)
        return found

    try:
        found = recall(kind, device, version, problem, timed)
    except torch.OutOfMemoryError:
        return None, f"launches of {problem} come from the built-in table: no memory to measure them"
    return found, f"launches of {problem} measured in {seconds[0]:.1f} s" if seconds else None


def _read(file: Path) -> list | None:
    try:
        choices = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return choices if isinstance(choices, list) and choices else None


def _write_first(file: Path, choices: list) -> None:
    """Puts the file in place unless another process did so first."""
    staging = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        staging.write_text(json.dumps(choices) + "\n")
        if _read(file) is None:
            staging.replace(file)
    with contextlib.suppress(OSError):
        staging.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:  # a read-only folder, or a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


def in_thread(function: Callable[[], Any]) -> Any:
    """Runs ``function`` in a thread of its own and returns its result.

    An inference engine loads weights inside a memory pool that belongs to the loading thread
    (vLLM's ``CuMemAllocator``), which would keep what a measurement allocates. Another thread
    allocates from PyTorch's ordinary pool.
    """
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = function()
        except BaseException as error:  # raised again in the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=run, name="kernel tuning")
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def copies_of(nbytes: int) -> int:
    """Returns how many copies of a weight of ``nbytes`` bytes a measurement rotates through."""
    return min(MOST_COPIES, max(2, math.ceil(ROTATE_BYTES / nbytes)))


def fastest(
    calls: Mapping[Candidate, Callable[[int], Any]], copies: int, time_call: Callable[..., float] | None = None
) -> tuple[Candidate, dict[Candidate, float]]:
    """Returns the candidate whose call takes the least time.

    Args:
        calls: candidate -> a call that takes the number of a weight copy. A candidate whose call
            raises a RuntimeError is left out.
        copies: number of copies of the weight.
        time_call: replaces :func:`graph_time` in tests.

    Returns:
        The candidate, and the time of each candidate in microseconds. The first of equally fast
        candidates wins.

    Raises:
        torch.OutOfMemoryError: there is no memory to measure in.
        RuntimeError: every call failed. It is chained to the last failure.
    """
    time_call = time_call or graph_time
    times: dict[Candidate, float] = {}
    failure: RuntimeError | None = None
    for candidate, call in calls.items():
        try:
            times[candidate] = time_call(call, copies, 2)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            failure = error
    if not times:
        raise RuntimeError("no launch configuration runs on this GPU") from failure
    finalists = sorted(times, key=times.__getitem__)[:FINALISTS]
    if len(finalists) > 1:
        times |= {candidate: time_call(calls[candidate], copies, 7) for candidate in finalists}
    return min(finalists, key=times.__getitem__), times


def graph_time(call: Callable[[int], Any], copies: int, replays: int) -> float:
    """Returns the median time of ``call(copy)`` in microseconds, from replays of a CUDA graph of
    many calls.

    Args:
        call: launches kernels on the current stream, and never synchronizes.
        copies: how many copies of the weight the calls rotate through.
        replays: timed replays.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call(1 % copies)
        end.record()
        end.synchronize()
        estimate = max(begin.elapsed_time(end) * 1e3, 1.0)
        count = max(2, min(24, math.ceil(400 / estimate)))
        count = math.ceil(count / copies) * copies if count > copies else count
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for i in range(count):
                call(i % copies)
        times = []
        graph.replay()
        for _ in range(replays):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def warm_up(seconds: float = 0.1) -> None:
    """Raises the GPU's clocks, which are low while it is idle, by running GEMMs for about
    ``seconds``.
    """
    x = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    elapsed = 0.0
    while elapsed < seconds * 1e3:
        for _ in range(50):
            x = torch.mm(x, x).clamp_(-1, 1)
        end.record()
        end.synchronize()
        elapsed = begin.elapsed_time(end)


def content_version(*parts: Sequence | str | bytes) -> str:
    """Returns a short hash of what a choice depends on."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return digest.hexdigest()[:16]
