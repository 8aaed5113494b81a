"""The owner's side of a shared base: a transformers model whose frozen weights lie in one block.

What two processes use in place are the NVFP4 weights and, where both compute in their dtype, the
embeddings and the output layer. Norms and biases are small, and a rollout puts noise on its norms,
so the block holds them to be copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from qerl_verl.kernels.backends import Adapter, Backend, Candidate, choose_backend, get_backend
from qerl_verl.nvfp4.architectures import Architecture
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.loading import load_tensors, prepack_linears
from qerl_verl.sharing.errors import SharingError
from qerl_verl.sharing.layout import Layout, LayoutBuilder
from qerl_verl.sharing.memory import SharedMemory

VOCABULARY_MULTIPLE = 64
"""vLLM pads embeddings and output layer to a multiple of it
(vllm/model_executor/layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)."""


@dataclass(frozen=True)
class OtherSide:
    """What the process that maps the base will compute with.

    Attributes:
        kernel: its setting, ``auto`` or a candidate's name.
        candidates: it chooses among these, the best first.
        lora_rank: of the adapter in its layers, or None.
        dtype: of its activations.
    """

    kernel: str
    candidates: Sequence[Candidate]
    lora_rank: int | None
    dtype: torch.dtype


def plan_layout(
    model: nn.Module,
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str,
    other: OtherSide,
) -> Layout:
    """Gives every tensor of a model its place.

    Args:
        model: a transformers model with :class:`NVFP4Linear` layers, on any device.
        device: where both processes compute.
        dtype: of this process's activations.
        kernel: this process's setting.

    Raises:
        SharingError: the two processes would not use the same bytes; with the reason.
    """
    if not architecture.shares_base:
        raise SharingError(f"one copy of the base has not been tried with {architecture.name}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NVFP4Linear)}
    builder = LayoutBuilder()
    for parts in _fused(layers, architecture):
        rows, columns = [layers[part].out_features for part in parts], layers[parts[0]].in_features
        backend = _common_backend(parts, rows, columns, device, dtype, kernel, other)
        builder.add_group(parts, rows, columns, backend.name)
    model.tie_weights()
    vocabulary = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    for name, parameter in model.named_parameters():
        if name.endswith(".weight_joined"):
            continue
        of_vocabulary = id(parameter) in vocabulary
        in_place = of_vocabulary and parameter.dtype == dtype == other.dtype
        builder.add_tensor(name, parameter, in_place, VOCABULARY_MULTIPLE if of_vocabulary else 1)
    return builder.build()


def load_base(
    model: nn.Module,
    path: str | Path,
    layout: Layout,
    memory: SharedMemory,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    kernel: str,
) -> tuple[Layout, str]:
    """Reads a checkpoint into a block of memory.

    Args:
        model: the one that ``layout`` was planned for; of no further use.
        path: the checkpoint folder.
        memory: of the layout's size, on the device that computes.
        dtype: of what is not packed.
        compute_dtype: of the activations.
        kernel: this process's setting.

    Returns:
        The layout with the global scales, and what was chosen as kernels.

    Raises:
        ValueError: the checkpoint is not this model's.
    """
    device = memory.data.device
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NVFP4Linear)}
    for group in layout.groups:
        for part in group.parts:
            layers[part].place(*group.views(memory.data, part))
    load_tensors(model, path, dtype)
    kernels = prepack_linears(model, device, kernel, compute_dtype)
    for name, plain in layout.tensors.items():
        view = plain.view(memory.data)
        plain.view(memory.data, plain.room)[len(view) :].zero_()
        view.copy_(model.get_parameter(name).detach())
    groups = []
    for group in layout.groups:
        if any(layers[part].backend.name != group.backend for part in group.parts):
            raise RuntimeError(f"{group.parts}: not in the layout of {group.backend}, as planned")
        scales = tuple(layers[part].weight_global_scale.item() for part in group.parts)
        groups.append(replace(group, global_scales=scales))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the other process reads on streams of its own
    return replace(layout, groups=tuple(groups)), kernels


def attach(model: nn.Module, layout: Layout, data: torch.Tensor) -> None:
    """Lets a model use a base in memory.

    What is shared becomes plain attributes of the model's modules. They are no parameters, so
    nothing moves, shards or saves them. The rest is copied.

    Args:
        model: with empty weights, of the checkpoint that ``data`` holds; modules that the
            checkpoint does not have stay as they are, and tensors that the model does not have are
            passed over.
        layout: from :func:`load_base`.
        data: the block, uint8.
    """
    model.tie_weights()
    for group in layout.groups:
        for part, scale in zip(group.parts, group.global_scales, strict=True):
            layer = model.get_submodule(part)
            layer.place(*group.views(data, part))
            layer.backend = get_backend(group.backend)
            layer.weight_global_scale = torch.tensor([scale], dtype=torch.float32)
    parameters = dict(model.named_parameters())
    for name in layout.tensors.keys() & parameters.keys():
        plain = layout.tensors[name]
        view = plain.view(data)
        _replace(model, parameters[name], view if plain.shared else nn.Parameter(view.clone(), requires_grad=False))


def _fused(layers: Mapping[str, NVFP4Linear], architecture: Architecture) -> Iterator[tuple[str, ...]]:
    """Yields the names of the linears that a rollout engine fuses; a linear that is not fused is
    alone.

    Raises:
        SharingError: NVFP4 holds some projections of a fused linear, but not all.
    """
    done: set[str] = set()
    for name in layers:
        if name in done:
            continue
        parts = (name,)
        for linears in architecture.scale_groups():
            for linear in linears:
                if name.endswith(f".{linear}"):
                    parts = tuple(name.removesuffix(linear) + other for other in linears)
        if missing := [part for part in parts if part not in layers]:
            raise SharingError(f"{missing[0]} is not in NVFP4, and the rollout fuses it with {name}")
        done.update(parts)
        yield parts


def _common_backend(
    parts: Sequence[str],
    rows: Sequence[int],
    columns: int,
    device: torch.device,
    dtype: torch.dtype,
    kernel: str,
    other: OtherSide,
) -> Backend:
    """Returns the backend that both processes choose for a fused weight and its projections.

    Raises:
        SharingError: there is none.
    """
    name, ends = " + ".join(parts), tuple(sum(rows[: i + 1]) for i in range(len(rows)))
    try:
        theirs = choose_backend(
            device,
            (ends[-1], columns),
            other.dtype,
            other.kernel,
            setting="qerl.rollout.kernel",
            layer=name,
            adapter=None if other.lora_rank is None else Adapter(other.lora_rank, ends),
            candidates=other.candidates,
        ).backend
        ours = {
            choose_backend(device, (count, columns), dtype, kernel, layer=part).backend.name
            for part, count in zip(parts, rows, strict=True)
        }
    except ValueError as error:
        raise SharingError(str(error)) from error
    if ours != {theirs.name} or not isinstance(theirs, Backend):
        raise SharingError(
            f"the actor computes {name} with {' and '.join(sorted(ours))}, the rollout with {theirs.name}"
        )
    backend = get_backend(theirs.name)
    unit = backend.fused_row_multiple
    if any(count % unit for count in rows[:-1]):
        raise SharingError(
            f"the {backend.name} layout of {name} is not that of its projections: their rows {tuple(rows)} are no "
            f"multiples of {unit}"
        )
    return backend


def _replace(model: nn.Module, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Puts another parameter, or a plain tensor, in the place of one, in each module that has it
    (tied weights)."""
    for module in model.modules():
        for leaf, found in list(module._parameters.items()):
            if found is parameter:
                delattr(module, leaf)
                setattr(module, leaf, tensor)
