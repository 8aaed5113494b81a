"""Provides a folder for the temporary files of one job on this host. It is removed when the job
ends, together with the job's segments of shared memory.

Ray ends a job's processes without giving them time to clean up. Each run of stock verl therefore
leaves vLLM's sockets and verl's lock files in the folder for temporary files, and vLLM's message
queues in ``/dev/shm``. With a job folder, the sockets and lock files lie in the folder (``TMPDIR``
of the job's processes), and the rollout's workers record the names of the queues in it at each
weight sync.

Only a job that starts Ray itself, on this host, has a folder. If its driver could not clean up
(kill -9), the next driver removes the folder as soon as it can tell that the owner is dead
(:mod:`qerl_verl.ownership`).

All of this is housekeeping: a full disk or a folder that may not be written to causes a warning,
never the end of the run.
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
"""Prefixes of the names that Python's SharedMemory, its semaphores, vLLM and verl's weight transfer
(vllm_rollout/bucketed_weight_transfer.py) use in shared memory.
"""

END_SECONDS = 20.0
"""How long the processes of an ended job may take to exit."""


@contextmanager
def _housekeeping(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("[qerl] %s: %s; the run goes on", what, error)


def open_job_folder() -> Path:
    """Creates the folder, arranges its removal at the end of this process, and removes the folders
    of dead drivers.

    Raises:
        OSError: the folder cannot be created.
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
    """Links the cache of precompiled C++ headers of the job's processes to the driver's.

    TorchInductor keeps these headers beside its default cache, in ``TMPDIR``, whatever
    ``TORCHINDUCTOR_CACHE_DIR`` says (torch/_inductor/codecache.py, _HEADER_DIR). Compiling them
    takes five seconds, so they outlive the job.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    cache = Path(default_cache_dir())
    cache.mkdir(parents=True, exist_ok=True)
    (folder / cache.name).symlink_to(cache)


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment variables of the job's processes.

    Two folders that follow TMPDIR by default keep their place, because they outlive the job or
    others look for them: TorchInductor's cache and Ray's own files.
    """
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
    """Records the segments of all of the job's processes on this host, for the removal after their
    end. Called in a process of the job.
    """
    folder = os.environ.get(JOB_FOLDER_ENV)
    if folder and Path(folder, SEGMENTS).is_dir():
        with _housekeeping("the job's shared memory could not be noted"):
            _note(Path(folder))


def _note(folder: Path) -> None:
    """Writes names and inodes, one segment a line. A segment that another job creates later under
    the same name has another inode.
    """
    mark = f"{JOB_FOLDER_ENV}={folder}".encode()
    mapped = {inode for process in _processes() if mark in _environment(process) for inode in _mapped(process)}
    segments = (entry for entry in os.scandir(SHARED_MEMORY) if entry.name.startswith(SEGMENT_NAMES))
    noted = sorted(f"{entry.name} {entry.inode()}" for entry in segments if entry.inode() in mapped)
    (folder / SEGMENTS / str(os.getpid())).write_text("\n".join(noted))


def _noted(folder: Path) -> set[Path]:
    """Returns the recorded segments that still have the recorded inode."""
    noted = set()
    for file in folder.glob(f"{SEGMENTS}/*"):
        for name, _, inode in (line.partition(" ") for line in file.read_text(errors="replace").splitlines()):
            path = SHARED_MEMORY / name
            if name.startswith(SEGMENT_NAMES) and "/" not in name and inode == str(_inode(path)):
                noted.add(path)
    return noted


def segments_in_use(segments: set[Path]) -> set[Path]:
    """Returns those of ``segments`` that a process of this host has mapped."""
    mapped = {inode for process in _processes() for inode in _mapped(process)} if segments else set()
    return {path for path in segments if _inode(path) in mapped}


def close_job_folder(folder: Path, patience: float = END_SECONDS) -> None:
    """Removes the folder and the segments recorded in it, once nothing uses the segments or
    ``patience`` seconds have passed. Segments in use stay.
    """
    with _housekeeping(f"what {folder} notes of shared memory could not be removed"):
        segments = _noted(folder)
        end = time.monotonic() + patience
        while (used := segments_in_use(segments)) and time.monotonic() < end:
            time.sleep(0.2)
        for segment in segments - used:
            segment.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _end(folder: Path, owner: int) -> None:
    """Shuts Ray down, then removes the folder. In atexit's order Ray's shutdown would come
    second."""
    if os.getpid() != owner:
        return
    with _housekeeping("the job's shared memory could not be noted"):
        _note(folder)
    # a process that is ending cannot import it any more, and has no need to
    if ray := sys.modules.get("ray"):
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
    """Returns the environment that the process was started with; empty if the process is gone or
    another user's.
    """
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
    """Returns the inodes of shared memory that a process has mapped (proc(5)); empty if the process
    is gone or another user's. The creator of a semaphore shows another name for it, which the C
    library has already removed.
    """
    try:
        text = Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return set()
    return {int(i) for i in re.findall(rf"(\d+) +{re.escape(str(SHARED_MEMORY))}/", text)}
