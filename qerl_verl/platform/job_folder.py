"""A folder for what one job leaves behind on this host; it goes when the job ends, and with it what the job left in shared memory.

Ray ends a job's processes without giving them time to clean up: each run of stock verl leaves vLLM's sockets and verl's lock files
in the folder for temporary files, and vLLM's message queues in ``/dev/shm``. Here the former lie in a folder of the job's own
(``TMPDIR`` of its processes), and the rollout's workers note in it the names of the latter, at each weight sync.

For jobs that start Ray themselves, on this host. What is left by a driver that could not clean up either (kill -9) is removed
by the next one.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from qerl_verl.switch import JOB_FOLDER_ENV

PREFIX = "qerl-job-"
OWNER, SEGMENTS = "owner", "segments"
SHARED_MEMORY = Path("/dev/shm")
MESSAGE_QUEUES = ("psm_", "sem.mp-", "vllm")
"""How Python's SharedMemory, its semaphores and vLLM name what they put there."""

END_SECONDS = 20.0
"""How long the processes of an ended job may take to go."""


def open_job_folder() -> Path:
    """Make the folder, to be removed when this process ends, and remove those of drivers that are gone."""
    for other in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if _is_dead(other):
            close_job_folder(other, patience=0.0)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    (folder / SEGMENTS).mkdir()
    (folder / OWNER).write_text(f"{os.getpid()} {_start_time(os.getpid())}")
    atexit.register(_end, folder, os.getpid())
    return folder


def environment(folder: Path) -> dict[str, str]:
    """For the job's processes. What follows TMPDIR, but has to outlive the job or to be found by others, stays where it was:
    TorchInductor's cache and Ray's own files."""
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
    """In a process of the job: write down the segments of all of its processes on this host, for when they are gone."""
    folder = os.environ.get(JOB_FOLDER_ENV)
    if folder and Path(folder, SEGMENTS).is_dir():
        _note(Path(folder))


def _note(folder: Path) -> None:
    mark = f"{JOB_FOLDER_ENV}={folder}".encode()
    mapped = {inode for process in _processes() if mark in _environment(process) for inode in _mapped(process)}
    segments = (entry for entry in os.scandir(SHARED_MEMORY) if entry.name.startswith(MESSAGE_QUEUES))
    noted = sorted(entry.name for entry in segments if entry.inode() in mapped)
    (folder / SEGMENTS / str(os.getpid())).write_text("\n".join(noted))


def segments_in_use(segments: set[Path]) -> set[Path]:
    """Those of ``segments`` that a process of this host has mapped."""
    mapped = {inode for process in _processes() for inode in _mapped(process)} if segments else set()
    return {path for path in segments if _inode(path) in mapped}


def close_job_folder(folder: Path, patience: float = END_SECONDS) -> None:
    """Remove the folder and the segments noted in it, once nothing uses these or ``patience`` seconds have gone by; what is in use
    stays."""
    noted = {n for f in folder.glob(f"{SEGMENTS}/*") for n in f.read_text().split()}
    segments = {SHARED_MEMORY / n for n in noted if n.startswith(MESSAGE_QUEUES) and "/" not in n}
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
    import ray

    _note(folder)
    ray.shutdown()
    close_job_folder(folder)


def _is_dead(folder: Path) -> bool:
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        process, start = (folder / OWNER).read_text().split()
    except (OSError, ValueError):  # not complete, or just gone
        return False
    return _start_time(int(process)) != start


def _start_time(process: int) -> str:
    """In clock ticks since the host's start (proc(5), field 22): with the number it names a process for good. Empty if it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


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
    """Inodes that a process has mapped of shared memory (proc(5)); empty if it is gone or another user's. A semaphore's creator shows
    another name for it, which the C library has removed again."""
    try:
        text = Path(f"/proc/{process}/maps").read_text()
    except OSError:
        return set()
    return {int(i) for i in re.findall(rf"(\d+) +{re.escape(str(SHARED_MEMORY))}/", text)}
