"""Errors of saving and loading checkpoints, with the folder and a fix. The errors of torch and of
the system name neither.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.ownership import host_name

_BROKEN = (EOFError, pickle.UnpicklingError, zipfile.BadZipFile, SafetensorError)
_TORCH_READER = ("PytorchStreamReader", "failed finding central directory", "archive is corrupted")
"""In the RuntimeError that ``torch.load`` raises for a file that is not what ``torch.save``
wrote (inline_container.cc)."""

_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")
"""In the RuntimeError that ``torch.save`` raises when it cannot write
(caffe2/serialize/inline_container.cc)."""


@contextmanager
def writing(folder: str, who: str) -> Iterator[None]:
    """Wraps the errors of a block that writes a checkpoint.

    Raises:
        CheckpointError: the disk or the quota is full, or the folder cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _TORCH_WRITER):
            raise
        raise CheckpointError(
            f"[qerl] {who}: the checkpoint could not be written to {folder} "
            f"({_first_line(error)}); {_free(folder)}. The checkpoints before it are as they were. "
            "Free some space, or see who may write there, and start the same command again."
        ) from error


@contextmanager
def reading(folder: str, who: str, world_size: int) -> Iterator[None]:
    """Wraps the errors of a block that loads a checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged, unreadable, or does not fit this run. The
            message advises moving the checkpoint away only for a missing or damaged file.
        Exception: any other error (out of memory, another rank's failure), unchanged except for a
            note that the checkpoint is not the cause.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        said = f"[qerl] {who}: cannot resume from {folder} ({type(error).__name__}: {_first_line(error)})"
        advice = _fix(error, folder, world_size)
        if advice is None:
            add_note(error, f"{said}. The checkpoint is not the cause and was not changed.")
            raise
        raise CheckpointError(f"{said}. {advice}") from error


def _fix(error: Exception, folder: str, world_size: int) -> str | None:
    """Returns what the user can do about an error of loading; None if it does not come from the
    checkpoint."""
    ranks = saved_ranks(folder)
    if isinstance(error, FileNotFoundError) and ranks and world_size not in ranks:
        return (
            f"It was saved by {ranks[0]} ranks and this run has {world_size}; optimizer and "
            f"adapter are stored rank by rank. Use {ranks[0]} ranks, or begin a new run with its "
            f"adapter: lora_adapter_path={os.path.join(folder, 'lora_adapter')} of the model, "
            "trainer.resume_mode=disable."
        )
    without = (
        f"With {os.path.dirname(folder)} moved out of trainer.default_local_dir, "
        "trainer.resume_mode=auto goes on from the whole checkpoint before it."
    )
    if isinstance(error, FileNotFoundError) and Path(str(error.filename or "")).is_relative_to(folder):
        return (
            f"If {host_name()} does not share this folder with the other nodes, put "
            f"trainer.default_local_dir where all of them see it. {without}"
        )
    if _is_broken(error):
        return without
    if isinstance(error, PermissionError):
        return f"Its files are there: let this user (id {os.getuid()}) read them, and start the same command again."
    if isinstance(error, OSError):
        return "The file system could not read it. Start the same command again when it can; the checkpoint was not changed."
    if isinstance(error, KeyError | ValueError) or "loading state_dict" in str(error):
        return (
            "Its files can be read and do not fit this run: it needs the model, lora_rank, "
            "target_modules and optimizer that it was saved with. The checkpoint was not changed."
        )
    return None


def _is_broken(error: Exception) -> bool:
    """Returns whether the error shows that a file of the checkpoint is truncated or corrupted."""
    reader = isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_READER)
    return isinstance(error, _BROKEN) or reader


def add_note(error: Exception, text: str) -> None:
    """Adds a note to an error; prints it to stderr in Python 3.10, whose errors have no notes."""
    if hasattr(error, "add_note"):
        error.add_note(text)
    else:
        print(text, file=sys.stderr, flush=True)


def saved_ranks(folder: str) -> list[int]:
    """Returns the world sizes for which the folder has a model file."""
    found = set()
    for path in Path(folder).glob("model_world_size_*_rank_*.pt"):
        number = path.name.removeprefix("model_world_size_").partition("_")[0]
        found |= {int(number)} if number.isdigit() else set()
    return sorted(found)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _free(folder: str) -> str:
    for place in (Path(folder), *Path(folder).parents):
        if place.exists():
            return f"{shutil.disk_usage(place).free / 1e9:.1f} GB are free there"
    return "nothing of its path exists"
