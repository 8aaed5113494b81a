"""Defines the error of checkpoint handling."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Errors of a place that cannot be written to: permissions, a read-only file system, a file where a
folder has to be, a name that is too long."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, quantized or used.

    The message names the file, tensor or setting, and the fix.
    """


@contextlib.contextmanager
def writes_to(folder: Path, fix: str) -> Iterator[None]:
    """Raises CheckpointError in place of an error that says that ``folder`` cannot be written to.

    Args:
        folder: what the block creates, or creates files in.
        fix: a sentence for the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise CheckpointError(f"{folder} cannot be written ({error.strerror}: {error.filename}). {fix}") from error
