"""Names and shapes of a model's linears, by its config.json alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qerl_verl.nvfp4.architectures import Architecture, get_architecture
from qerl_verl.nvfp4.checkpoint_files import load_hf_config, read_config
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.safetensors_stream import TensorInfo, nbytes


def linear_shapes(path: str | Path) -> dict[str, tuple[int, int]]:
    """Returns full name -> (output, input features) of a model's packed, or packable, linears.

    Args:
        path: a model folder, quantized or not. Only its config.json is read.

    Raises:
        UnsupportedArchitecture: the model is not supported.
        CheckpointError: config.json is not readable.
    """
    path = Path(path)
    architecture, hf_config = get_architecture(read_config(path)), load_hf_config(path)
    shapes = architecture.tensor_shapes(hf_config)
    linears = [linear for group in architecture.all_groups(hf_config) for linear in group]
    return {linear: (shapes[f"{linear}.weight"][0], shapes[f"{linear}.weight"][1]) for linear in linears}


def adaptable_shapes(path: str | Path) -> dict[str, tuple[int, int]]:
    """Returns full name -> (output, input features) of the linears that can have a LoRA adapter.

    See :meth:`~qerl_verl.nvfp4.architectures.Architecture.adaptable`.

    Raises:
        UnsupportedArchitecture, CheckpointError: as :func:`linear_shapes`.
    """
    shapes = linear_shapes(path)
    return {linear: shapes[linear] for linear in get_architecture(read_config(Path(path))).adaptable(shapes)}


def tower_linears(path: str | Path) -> list[str]:
    """Returns the full names of the 16-bit linears of a model's vision tower, if it has one.

    Args:
        path: see :func:`linear_shapes`.

    Raises:
        UnsupportedArchitecture, CheckpointError: as :func:`linear_shapes`.
    """
    path = Path(path)
    architecture = get_architecture(read_config(path))
    shapes = architecture.tensor_shapes(load_hf_config(path)) if architecture.vision else {}
    tower = (name for name, shape in shapes.items() if name.startswith(architecture.vision) and len(shape) == 2)
    return [name.removesuffix(".weight") for name in tower]


def decoder_layers(hf_config: Any) -> int:
    """Returns the number of a model's decoder layers.

    Args:
        hf_config: transformers' configuration of the model.
    """
    return hf_config.get_text_config().num_hidden_layers


def fused_linears(architecture: Architecture, hf_config: Any) -> Iterator[tuple[str, ...]]:
    """Yields the full names of the linears that vLLM computes as one layer.

    These are fused projections, and all experts of a layer. They must be all packed or all plain.
    """
    for i in range(decoder_layers(hf_config)):
        prefix, of_experts, experts = f"{architecture.layer_prefix}{i}.", [], architecture.experts
        for group in architecture.layer_groups(hf_config, i):
            if experts is not None and group[0].startswith(f"{experts.module}."):
                of_experts += group
            else:
                yield tuple(prefix + linear for linear in group)
        if of_experts:
            yield tuple(prefix + linear for linear in of_experts)


def name_group(group: tuple[str, ...]) -> str:
    """Returns the names of linears that vLLM fuses as text for a message."""
    return ", ".join(group) if len(group) <= 3 else f"the {len(group)} linears {group[0]} to {group[-1]}"


def split_experts(tensors: dict[str, TensorInfo], architecture: Architecture, hf_config: Any) -> dict[str, TensorInfo]:
    """Returns the tensors of a 16- or 32-bit checkpoint with one matrix per linear of an expert.

    A checkpoint may stack the experts of a layer (``gate_up_proj`` ``[E, 2 I, H]``, ``down_proj``
    ``[E, H, I]``). The matrices of one expert are contiguous there, so they are regions of the same
    files.

    Raises:
        CheckpointError: a stack has another shape.
    """
    if architecture.experts is None:
        return tensors
    stacks, linears = architecture.experts.stacked_shapes(hf_config), list(architecture.experts.linears(hf_config))
    out = {}
    for name, info in tensors.items():
        stack = next((stack for stack in stacks if name.endswith(f".{stack}")), None)
        if stack is None:
            out[name] = info
            continue
        if info.shape != stacks[stack]:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json says {list(stacks[stack])}."
            )
        prefix, offset = name.removesuffix(stack), info.offset
        for gate, up, down in linears:
            parts = (gate, up) if stack.endswith("gate_up_proj") else (down,)
            shape = info.shape[1] // len(parts), info.shape[2]
            for part in parts:
                out[f"{prefix}{part}.weight"] = TensorInfo(info.file, offset, info.dtype, shape)
                offset += nbytes(info.dtype, shape)
    return out
