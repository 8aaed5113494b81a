"""A folder for what one job leaves behind on this host; it goes when the job ends, and with it what
the job left in shared memory.

Ray ends a job's processes without giving them time to clean up: each run of stock verl leaves
vLLM's sockets and verl's lock files in the folder for temporary files, and vLLM's message queues in
``/dev/shm``. Here the former lie in a folder of the job's own (``TMPDIR`` of its processes), and
the rollout's workers note in it the names of the latter, at each weight sync.

For jobs that start Ray themselves, on this host. What is left by a driver that could not clean up
either (kill -9) is removed by the next one, if that one can tell that the driver is dead
(:mod:`qerl_verl.ownership`).

All of this is housekeeping: a full disk or a folder that may not be written to costs a warning,
never the run.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qerl_verl.ownership import Owner, state_of
from qerl_verl.switch import JOB_FOLDER_ENV

logger = logging.getLogger(__name__)

PREFIX = "qerl-job-"
OWNER, SEGMENTS = "owner", "segments"
SHARED_MEMORY = Path("/dev/shm")
SEGMENT_NAMES = ("psm_", "sem.mp-", "vllm", "verl_weights_")
"""How Python's SharedMemory, its semaphores, vLLM and verl's weight transfer
(vllm_rollout/bucketed_weight_transfer.py) name what they put there."""

END_SECONDS = 20.0
"""How long the processes of an ended job may take to go."""


@contextmanager
def _housekeeping(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("[qerl] %s: %s; the run goes on", what, error)


def open_job_folder() -> Path:
    """Makes the folder, to be removed when this process ends, and remove those of drivers that are
    dead.

    Raises:
        OSError: the folder cannot be made.
    """
    for other in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_dead(other):
            close_job_folder(other, patience=0.0)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        (folder / SEGMENTS).mkdir()
        Owner.current().write(folder / OWNER)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    with _housekeeping("TorchInductor's compiled headers are not kept"):
        _link_compilers_cache(folder)
    atexit.register(_end, folder, os.getpid())
    return folder


def _link_compilers_cache(folder: Path) -> None:
    """TorchInductor keeps the C++ headers that it compiles beside its default cache, in ``TMPDIR``,
    whatever ``TORCHINDUCTOR_CACHE_DIR`` says (torch/_inductor/codecache.py, _HEADER_DIR). Compiling
    them takes five seconds, so
    they outlive the job: the default cache of its processes is the driver's."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    cache = Path(default_cache_dir())
    cache.mkdir(parents=True, exist_ok=True)
    (folder / cache.name).symlink_to(cache)


def environment(folder: Path) -> dict[str, str]:
    """For the job's processes. What follows TMPDIR, but has to outlive the job or to be found by
    others, stays where it was: TorchInductor's cache and Ray's own files."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()
    ray = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return {
        JOB_FOLDER_ENV: str(folder),
        "TMPDIR": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "RAY_TMPDIR": ray,
    }


def note_segments() -> None:
    """In a process of the job: write down the segments of all of its processes on this host, for
    when they are gone."""
    folder = os.environ.get(JOB_FOLDER_ENV)
    if folder and Path(folder, SEGMENTS).is_dir():
        with _housekeeping("the job's shared memory could not be noted"):
            _note(Path(folder))


def _note(folder: Path) -> None:
    """Names and inodes, a line each: a segment that another job makes under the same name is
    another one."""
    mark = f"{JOB_FOLDER_ENV}={folder}".encode()
    mapped = {inode for process in _processes() if mark in _environment(process) for inode in _mapped(process)}
    segments = (entry for entry in os.scandir(SHARED_MEMORY) if entry.name.startswith(SEGMENT_NAMES))
    noted = sorted(f"{entry.name} {entry.inode()}" for entry in segments if entry.inode() in mapped)
    (folder / SEGMENTS / str(os.getpid())).write_text("\n".join(noted))


def _noted(folder: Path) -> set[Path]:
    """Returns what the job's processes noted and is still what they noted."""
    noted = set()
    for file in folder.glob(f"{SEGMENTS}/*"):
        for name, _, inode in (line.partition(" ") for line in file.read_text(errors="replace").splitlines()):
            path = SHARED_MEMORY / name
            if name.startswith(SEGMENT_NAMES) and "/" not in name and inode == str(_inode(path)):
                noted.add(path)
    return noted


def segments_in_use(segments: set[Path]) -> set[Path]:
    """Those of ``segments`` that a process of this host has mapped."""
    mapped = {inode for process in _processes() for inode in _mapped(process)} if segments else set()
    return {path for path in segments if _inode(path) in mapped}


def close_job_folder(folder: Path, patience: float = END_SECONDS) -> None:
    """Removes the folder and the segments noted in it, once nothing uses these or ``patience``
    seconds have gone by; what is in use stays."""
    with _housekeeping(f"what {folder} notes of shared memory could not be removed"):
        segments = _noted(folder)
        end = time.monotonic() + patience
        while (used := segments_in_use(segments)) and time.monotonic() < end:
            time.sleep(0.2)
        for segment in segments - used:
            segment.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _end(folder: Path, owner: int) -> None:
    """Ray's own end comes after this one in atexit's order, but has to come first."""
    if os.getpid() != owner:
        return
    with _housekeeping("the job's shared memory could not be noted"):
        _note(folder)
    if ray := sys.modules.get("ray"):  # a process that is ending cannot import it any more, and has no need to
        ray.shutdown()
    close_job_folder(folder)


def _is_dead(folder: Path) -> bool:
    """Returns whether this user made the folder and its driver is dead."""
    try:
        return folder.lstat().st_uid == os.getuid() and state_of(folder / OWNER) == "dead"
    except OSError:  # just gone
        return False


def _processes() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _environment(process: int) -> list[bytes]:
    """As the process was started; empty if it is gone or another user's."""
    try:
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _mapped(process: int) -> set[int]:
    """Inodes that a process has mapped of shared memory (proc(5)); empty if it is gone or another
    user's. A semaphore's creator shows another name for it, which the C library has removed
    again."""
    try:
        text = Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return set()
    return {int(i) for i in re.findall(rf"(\d+) +{re.escape(str(SHARED_MEMORY))}/", text)}
