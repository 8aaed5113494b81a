"""A folder that is complete or absent, whatever happens to the process that writes it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from qerl_verl.nvfp4.errors import CheckpointError

_FOREIGN_SECONDS = 24 * 3600.0  # age at which an unfinished folder of another host is taken for dead


@contextlib.contextmanager
def atomic_folder(dst: Path) -> Iterator[Path]:
    """Give a new folder beside ``dst`` to write to. At the end of the block it becomes ``dst``; on an error it goes.

    What killed processes left of earlier attempts at ``dst`` is removed first.

    Args:
        dst: absent, or an empty folder.

    Raises:
        CheckpointError: ``dst`` is not empty any more when the rename is due, or cannot be replaced.
    """
    dst.parent.mkdir(parents=True, exist_ok=True)
    for leftover in dst.parent.glob(f"{dst.name}.tmp-*"):
        with contextlib.suppress(FileNotFoundError):  # someone else removes it too
            if _is_dead(leftover):
                shutil.rmtree(leftover, ignore_errors=True)
    temporary = dst.with_name(f"{dst.name}.tmp-{host_name()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(dst)
        except OSError as error:
            raise CheckpointError(
                f"{dst} cannot be put in place ({error.strerror}): something else wrote to it meanwhile, or it is a "
                "mount point. Choose another folder."
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def host_name() -> str:
    return socket.gethostname() or "unknown"


def _is_dead(leftover: Path) -> bool:
    match = re.fullmatch(r".*\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}", leftover.name)
    if match is None:  # not ours
        return False
    if match["host"] != host_name():
        return time.time() - leftover.stat().st_mtime > _FOREIGN_SECONDS
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # alive, and someone else's
        pass
    return False
