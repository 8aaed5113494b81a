"""Checks of a checkpoint's tensors against its model: names, shapes, dtypes and values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qerl_verl.nvfp4.architectures import Architecture
from qerl_verl.nvfp4.checkpoint_files import CONFIG_FILE, read_config, read_headers
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import WEIGHT_DTYPES, is_ignored, matches, read_ignore
from qerl_verl.nvfp4.model_shapes import split_experts
from qerl_verl.nvfp4.safetensors_stream import TensorInfo, read_pieces, read_tensor
from qerl_verl.nvfp4.unused_tensors import is_unused

_NAN_SCALE, _NEGATIVE_ZERO = 0x7F, 0x80  # E4M3 bytes
_ANNOUNCED_SCALES = 500_000_000  # bytes; a larger amount of scales is read behind a progress bar
# Bounds of a global scale: the scale and its reciprocal are normal float32 numbers.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126


def check_source_tensors(path: Path, architecture: Architecture, hf_config: Any) -> dict[str, TensorInfo]:
    """Returns the headers of a 16- or 32-bit checkpoint.

    Raises:
        CheckpointError: the checkpoint does not hold exactly the tensors of its model.
    """
    tensors = split_experts(read_headers(path), architecture, hf_config)
    shapes = architecture.tensor_shapes(hf_config)
    check_tensors(path, tensors, shapes, WEIGHT_DTYPES)
    check_names(path, tensors, shapes.keys(), architecture, hf_config.tie_word_embeddings)
    return tensors


def check_tensors(
    path: Path, tensors: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]], dtypes: tuple[str, ...]
) -> None:
    """Refuses a checkpoint that lacks a tensor, or has it in another shape or dtype.

    Args:
        path: for messages.
        tensors: the tensors of the checkpoint.
        shapes: full name -> shape that the model has.
        dtypes: the dtypes that are allowed, as in safetensors.

    Raises:
        CheckpointError: names the first tensor that is wrong.
    """
    for name, shape in shapes.items():
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(f"{path}: tensor {name} is missing. Its config.json describes a model that has it.")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json says {list(shape)}."
            )
        if info.dtype not in dtypes:
            raise CheckpointError(f"{info.file}: tensor {name} is {info.dtype}, expected {' or '.join(dtypes)}.")


def check_names(
    path: Path, tensors: dict[str, TensorInfo], expected: Set[str], architecture: Architecture, tied: bool
) -> None:
    """Refuses tensors that the model does not have, which would be lost or stop the actor."""
    unexpected = [name for name in tensors if name not in expected and not is_unused(name)]
    if tied and "lm_head.weight" in unexpected:
        _check_tied(tensors["lm_head.weight"], tensors[architecture.embeddings], architecture.embeddings)
        unexpected.remove("lm_head.weight")
    if unexpected:
        raise CheckpointError(
            f"{path}: {len(unexpected)} of {len(tensors)} tensors are none of the model that "
            "config.json describes: "
            f"{', '.join(unexpected[:4])}{', ...' if len(unexpected) > 4 else ''}. Give the plain "
            "language model: save it without what was added for training, as a value head, or "
            "correct config.json."
        )


def _check_tied(head: TensorInfo, embeddings: TensorInfo, name: str) -> None:
    """Refuses an output layer that differs from the embeddings where config.json ties the two.

    vLLM and the actor then use the embeddings as output layer; transformers does not when they
    differ (modeling_utils.py, tie_weights).
    """
    same = head.shape == embeddings.shape and head.dtype == embeddings.dtype
    if not same or not all(map(torch.equal, read_pieces(head), read_pieces(embeddings))):
        raise CheckpointError(
            f"{head.file}: lm_head.weight differs from {name}, but config.json says "
            "tie_word_embeddings: true. Set it to false, or remove lm_head.weight."
        )


def check_plain_linears(
    path: Path, tensors: Mapping[str, TensorInfo], linears: Iterable[str], ignore: Iterable[str] | None = None
) -> None:
    """Refuses a quantized linear that has to be in 16 bits, and one that vLLM would treat as
    packed.

    These are the routers of experts, and the small linears of delta nets
    (:meth:`~qerl_verl.nvfp4.architectures.Architecture.plain_linears`).

    Args:
        path: for messages.
        tensors: the tensors of a quantized checkpoint.
        linears: full names.
        ignore: the quantization's ``ignore``; None where the format does not use it.

    Raises:
        CheckpointError: names the linear.
    """
    for linear in linears:
        parts = (f"{linear}.weight_packed", f"{linear}.weight_scale")
        kind = "the router of the experts" if linear.endswith(".gate") else "this linear of a delta net"
        fix = f"re:.*{'.'.join(linear.split('.')[-2:])}$ among the ignored modules."
        if part := next((part for part in parts if part in tensors), None):
            raise CheckpointError(
                f"{tensors[part].file}: {part}: {kind} is quantized, but it stays in 16 bits here. "
                f"Quantize the original checkpoint with `qerl quantize`, or export it again with {fix}"
            )
        if ignore is not None and not is_ignored(linear, ignore):
            raise CheckpointError(
                f"{path}: {kind.split(' of ')[0]} {linear} is in 16 bits, but ignore in config.json "
                f"does not name it. Export the checkpoint again with {fix}"
            )


def check_matched(path: Path, linears: Iterable[str]) -> None:
    """Refuses a config.json with which vLLM would build a packed linear without NVFP4.

    The actor goes by the tensors alone. vLLM decides in its compressed_tensors/utils.py
    (should_ignore_layer, find_matched_target).
    """
    config = read_config(path)
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    ignore = read_ignore(path)
    targets = [
        target for group in quantization.get("config_groups", {}).values() for target in group.get("targets") or ()
    ]
    for linear in linears:
        ignored = next((i for i in ignore if matches(i, linear)), None)
        if ignored is not None or not any(target == "Linear" or matches(target, linear) for target in targets):
            why = (
                f"its ignore list has {ignored}"
                if ignored
                else f"its config_groups have the targets {', '.join(targets)}"
            )
            raise CheckpointError(
                f"{path / CONFIG_FILE}: {linear} is packed, but quantization_config leaves it out: "
                f"{why}. Fetch or export the checkpoint again."
            )


def check_scales(tensors: dict[str, TensorInfo], linears: Iterable[str]) -> None:
    """Refuses scales that decode to NaN or Inf, or that some kernel reads differently."""
    scales = {f"{linear}.weight_scale": tensors[f"{linear}.weight_scale"] for linear in linears}
    size = sum(info.nbytes for info in scales.values())
    show = size > _ANNOUNCED_SCALES
    with tqdm(total=size, desc="Checking NVFP4 scales", unit="B", unit_scale=True, disable=not show) as bar:
        for name, info in scales.items():
            global_name = name.replace(".weight_scale", ".weight_global_scale")
            value = read_tensor(tensors[global_name]).item()
            if not _SMALLEST <= value <= _LARGEST:  # also false for NaN
                raise CheckpointError(
                    f"{tensors[global_name].file}: tensor {global_name} is {value:g}; it divides "
                    "the weight, so it has to be a positive, finite number. Fetch or export the "
                    "checkpoint again."
                )
            for piece in read_pieces(info):
                codes = piece.view(torch.uint8)
                if (
                    codes.max() >= _NAN_SCALE
                    and (bad := codes[(codes >= _NAN_SCALE) & (codes != _NEGATIVE_ZERO)]).numel()
                ):
                    nan = int(((bad & 0x7F) == _NAN_SCALE).sum())
                    raise CheckpointError(
                        f"{info.file}: tensor {name} holds {nan} NaN and {bad.numel() - nan} "
                        f"negative scales in one piece of {codes.numel()}. Fetch or export the "
                        "checkpoint again."
                    )
            bar.update(info.nbytes)


def finite_amax(tensor: torch.Tensor, name: str, info: TensorInfo) -> torch.Tensor:
    """Returns the largest magnitude of a tensor, a float32 scalar.

    Args:
        tensor: values in 16 or 32 bits.
        name: for messages.
        info: for messages.

    Raises:
        CheckpointError: a value is NaN or Inf.
    """
    amax = torch.stack(torch.aminmax(tensor)).float().abs().max()
    if not torch.isfinite(amax):
        raise CheckpointError(f"{info.file}: tensor {name} holds NaN or Inf. Fetch or export the checkpoint again.")
    return amax
