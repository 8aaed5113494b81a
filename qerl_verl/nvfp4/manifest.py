"""Writes and reads the manifest of a folder that this package wrote: its method, source and
files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qerl_verl.file_sizes import find_differences
from qerl_verl.nvfp4.checkpoint_files import write_json
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import FORMAT, FORMAT_VERSION
from qerl_verl.nvfp4.safetensors_stream import FileRecord, file_sha256

MANIFEST_FILE = "qerl_manifest.json"


def write_manifest(folder: Path, source: Path, method: str, records: Mapping[str, FileRecord], **details: Any) -> None:
    """Writes the manifest of a finished folder.

    Args:
        folder: the folder; it holds the files of ``records``.
        source: the folder of the original checkpoint.
        method: how the tensors were made, a quantization method or ``converted from FORMAT``.
        records: file name -> size and SHA-256, of every other file.
        details: more entries.
    """
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "method": method,
        "source": str(source.resolve()),
        "files": {name: asdict(record) for name, record in records.items()},
        **details,
    }
    write_json(folder / MANIFEST_FILE, manifest)


def read_method(folder: Path) -> str | None:
    """Returns ``method`` of :func:`write_manifest`; None without a readable manifest."""
    try:
        return json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8")).get("method")
    except (OSError, ValueError, AttributeError):
        return None


def read_records(folder: Path) -> dict[str, FileRecord]:
    """Returns file name -> size and SHA-256, as the manifest lists them.

    Raises:
        CheckpointError: there is no manifest, or it is damaged.
    """
    file = folder / MANIFEST_FILE
    try:
        files = json.loads(file.read_text(encoding="utf-8"))["files"]
        return {name: FileRecord(record["size"], record["sha256"]) for name, record in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}.") from error


def check_files(
    folder: Path,
    *,
    hashed: Callable[[str], bool] = lambda name: True,
    sha256: Callable[[Path], str] = file_sha256,
    progress: bool = False,
) -> int:
    """Compares the files of a folder with its manifest.

    Args:
        folder: a folder with a manifest.
        hashed: whether the content of a file is compared, by its name. Sizes always are.
        sha256: returns the SHA-256 of a file.
        progress: show a progress bar on stderr.

    Returns:
        The number of files that the manifest lists.

    Raises:
        CheckpointError: names the first file that is missing or differs, or the manifest.
    """
    records = read_records(folder)
    compared = find_differences(folder, {name: record.size for name, record in records.items()})
    bar = tqdm(compared, desc="Checking hashes", unit="file", total=len(records), disable=not progress)
    for name, difference in bar:
        if difference:
            raise CheckpointError(f"{folder / name} {difference} ({MANIFEST_FILE}).")
        if hashed(name) and sha256(folder / name) != records[name].sha256:
            raise CheckpointError(f"{folder / name}: its content is not what was written ({MANIFEST_FILE}).")
    return len(records)
