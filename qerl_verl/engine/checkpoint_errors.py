"""Errors of saving and loading that name the folder and the cure, where torch and the system name a byte."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from qerl_verl.nvfp4.errors import CheckpointError

_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "unexpected pos")
"""In the RuntimeError that ``torch.save`` raises when it cannot write (caffe2/serialize/inline_container.cc)."""


@contextmanager
def writing(folder: str, who: str) -> Iterator[None]:
    """Around what writes a checkpoint.

    Raises:
        CheckpointError: the disk or the quota is full, or the folder cannot be written to.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in _TORCH_WRITER):
            raise
        raise CheckpointError(
            f"[qerl] {who}: the checkpoint could not be written to {folder} ({_first_line(error)}); {_free(folder)}. The "
            "checkpoints before it are as they were. Free some space, or see who may write there, and start the same "
            "command again."
        ) from error


@contextmanager
def reading(folder: str, who: str, world_size: int) -> Iterator[None]:
    """Around what loads a checkpoint.

    Raises:
        CheckpointError: a file is missing, cannot be read or does not fit.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        ranks = saved_ranks(folder)
        if ranks and world_size not in ranks:
            raise CheckpointError(
                f"[qerl] {who}: {folder} was saved by {ranks[0]} ranks and this run has {world_size}; optimizer and adapter "
                f"are stored rank by rank. Use {ranks[0]} ranks, or begin a new run with its adapter: "
                f"lora_adapter_path={os.path.join(folder, 'lora_adapter')} of the model, trainer.resume_mode=disable."
            ) from error
        raise CheckpointError(
            f"[qerl] {who}: cannot resume from {folder} ({type(error).__name__}: {_first_line(error)}). Delete or move "
            f"{os.path.dirname(folder)}: with trainer.resume_mode=auto the run then goes on from the whole checkpoint before it."
        ) from error


def saved_ranks(folder: str) -> list[int]:
    """The numbers of ranks that have a model file there."""
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
