"""A folder that is complete or absent, whatever happens to the process that writes it.

Beside the destination lies, while it is written, a folder ``<name>.tmp-<random>`` that holds
``owner`` (see :mod:`qerl_verl.ownership`), ``content``, which becomes the destination by one
rename, and for the moment between two renames ``replaced``, the folder that stood there before. A
process that dies leaves it to the next attempt.
"""

from __future__ import annotations

import contextlib
import glob
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.ownership import Owner

_OWNER, _CONTENT, _REPLACED, _OBSOLETE = "owner", "content", "replaced", "obsolete"


@contextlib.contextmanager
def atomic_folder(dst: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a new folder to write to. At the end of the block it becomes ``dst``; on an error it
    goes.

    Args:
        dst: absent, or an empty folder; with ``replace`` also a folder that the new one takes the
            place of. That one is moved aside first and removed when the new one is in place.
        replace: see ``dst``.

    Raises:
        CheckpointError: ``dst`` is not empty any more when the rename is due, or cannot be
            replaced.
    """
    settle_leftovers(dst)
    dst.parent.mkdir(parents=True, exist_ok=True)
    workspace = dst.with_name(f"{dst.name}.tmp-{uuid.uuid4().hex[:8]}")
    content, replaced = workspace / _CONTENT, workspace / _REPLACED
    workspace.mkdir()
    try:
        Owner.current().write(workspace / _OWNER)
        content.mkdir()
        yield content
        try:
            if replace and dst.exists():
                dst.rename(replaced)
            content.rename(dst)
        except OSError as error:
            raise CheckpointError(
                f"{dst} cannot be put in place ({error.strerror}): something else wrote to it meanwhile, or it is a "
                "mount point. Choose another folder."
            ) from error
    finally:
        _settle(workspace, dst)


def settle_leftovers(dst: Path) -> None:
    """Finishes what killed processes left of earlier attempts at ``dst``.

    A folder that one of them had moved aside comes back where nothing stands in its place; the rest
    of theirs is removed. What belongs to a process that cannot be judged from here (another host,
    another container) is left alone and named on stderr.
    """
    for workspace in dst.parent.glob(f"{glob.escape(dst.name)}.tmp-*"):
        owner = Owner.read(workspace / _OWNER)
        state = "unknown" if owner is None else owner.state()
        if state == "dead":
            _settle(workspace, dst)
        elif state == "unknown" and workspace.is_dir():
            whose = f"it belongs to {owner}, which cannot be seen from here" if owner else "it does not say whose it is"
            aside = f"; {workspace / _REPLACED} is what stood at {dst}" if (workspace / _REPLACED).is_dir() else ""
            print(f"qerl: {workspace} is left as it is: {whose}{aside}", file=sys.stderr)


def _settle(workspace: Path, dst: Path) -> None:
    """Ends an attempt at ``dst`` that stopped anywhere.

    What it had moved aside comes back if the new folder did not take its place, and goes if it did.
    If something else stands at ``dst`` by now, it stays where it is and stderr says so.
    """
    content, replaced, obsolete = (workspace / name for name in (_CONTENT, _REPLACED, _OBSOLETE))
    try:
        if content.is_dir():
            replaced.rename(dst)
        else:  # under another name first: half of it, left by a kill now, must not come back
            replaced.rename(obsolete)
    except FileNotFoundError:  # nothing was moved aside
        pass
    except OSError as error:
        print(f"qerl: {replaced} is what stood at {dst} before; it stays there ({error.strerror})", file=sys.stderr)
        return
    for folder in (content, obsolete, workspace):  # the owner's name last
        shutil.rmtree(folder, ignore_errors=True)
