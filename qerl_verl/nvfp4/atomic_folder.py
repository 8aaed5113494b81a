"""Provides a folder that is complete or absent, whatever happens to the process that writes it.

During the write, a workspace ``<name>.tmp-<random>`` lies beside the destination. It holds
``owner`` (see :mod:`qerl_verl.ownership`) and ``content``, which becomes the destination by one
rename. Between two renames it also holds ``replaced``, the previous folder. If the process dies,
the next attempt settles its workspace.
"""

from __future__ import annotations

import contextlib
import glob
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from qerl_verl.nvfp4.errors import CheckpointError, writes_to
from qerl_verl.ownership import Owner

_OWNER, _CONTENT, _REPLACED, _OBSOLETE = "owner", "content", "replaced", "obsolete"


@contextlib.contextmanager
def atomic_folder(dst: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a new folder to write to, which becomes ``dst`` at the end of the block.

    On an error the new folder is removed.

    Args:
        dst: absent, or an empty folder; with ``replace`` also a folder to be replaced. That folder
            is moved aside first, and removed when the new one is in place.
        replace: see ``dst``.

    Raises:
        CheckpointError: ``dst`` is not empty when the rename is due, or cannot be replaced.
    """
    settle_leftovers(dst)
    workspace = dst.with_name(f"{dst.name}.tmp-{uuid.uuid4().hex[:8]}")
    content, replaced = workspace / _CONTENT, workspace / _REPLACED
    with writes_to(dst, "Choose another folder."):
        dst.parent.mkdir(parents=True, exist_ok=True)
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
                f"{dst} cannot be put in place ({error.strerror}): something else wrote to it "
                "meanwhile, or it is a mount point. Choose another folder."
            ) from error
    finally:
        _settle(workspace, dst)


def settle_leftovers(dst: Path) -> None:
    """Settles what killed processes left of earlier attempts at ``dst``.

    A folder that such a process had moved aside is moved back if its place is empty. The rest of
    the workspace is removed. A workspace whose process cannot be judged from here (another host,
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
    """Ends an attempt at ``dst`` that stopped at any point.

    The folder that was moved aside is moved back if the new folder did not take its place, and is
    removed otherwise. If another folder stands at ``dst``, the old one stays in the workspace and
    stderr says so.
    """
    content, replaced, obsolete = (workspace / name for name in (_CONTENT, _REPLACED, _OBSOLETE))
    try:
        if content.is_dir():
            replaced.rename(dst)
        else:  # renamed before removal: after a kill, a half-removed folder must not be moved back
            replaced.rename(obsolete)
    except FileNotFoundError:  # nothing was moved aside
        pass
    except OSError as error:
        print(f"qerl: {replaced} is what stood at {dst} before; it stays there ({error.strerror})", file=sys.stderr)
        return
    for folder in (content, obsolete, workspace):  # removes the owner's name last
        shutil.rmtree(folder, ignore_errors=True)
