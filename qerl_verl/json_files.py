"""Writes JSON files by a rename, so that no reader sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_json_atomically(
    path: Path, content: Any, *, default: Callable[[Any], Any] | None = None, sync: bool = False
) -> None:
    """Writes or replaces a file. After an error the old file is as it was.

    Args:
        path: the file; its folder exists.
        content: what :func:`json.dumps` takes.
        default: see :func:`json.dumps`.
        sync: wait until the content is on the disk (fsync(2)) before the rename.

    Raises:
        OSError: it cannot be written.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1, default=default) + "\n")
            if sync:
                file.flush()
                os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
