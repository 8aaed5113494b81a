"""Compares files with the sizes that were recorded when they were written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path


def find_differences(folder: Path, sizes: Mapping[str, int]) -> Iterator[tuple[str, str | None]]:
    """Yields the name of each recorded file with what differs, such as ``is missing``, or None for
    a file of the recorded size.

    Args:
        folder: the folder with the files.
        sizes: path in the folder -> size in bytes.
    """
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            yield name, "is missing"
        elif (found := file.stat().st_size) != size:
            yield name, f"is {found} bytes long and was {size}"
        else:
            yield name, None
