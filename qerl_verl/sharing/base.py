"""Implements the owner's side of a shared base: a transformers model with its weights in one block.

Two processes use the NVFP4 weights in place, and also the embeddings and the output layer where
both compute in their dtype. Norms and biases are small, and a rollout puts noise on its norms, so
these are in the block only to be copied.
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
"""Number that vLLM pads embeddings and output layer to a multiple of
(vllm/model_executor/layers/vocab_parallel_embedding.py, DEFAULT_VOCAB_PADDING_SIZE)."""


@dataclass(frozen=True)
class OtherSide:
    """Describes how the process that maps the base will compute.

    Attributes:
        kernel: its kernel setting, ``auto`` or a candidate's name.
        candidates: the kernels that it chooses among, best first.
        lora_rank: rank of the adapter in its layers, or None.
        dtype: dtype of its activations.
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
    """Assigns every tensor of a model its place in the block.

    Args:
        model: a transformers model with :class:`NVFP4Linear` layers, on any device.
        architecture: the model's row of the table of architectures.
        device: where both processes compute.
        dtype: dtype of this process's activations.
        kernel: this process's kernel setting.
        other: the process that maps the base.

    Raises:
        SharingError: the two processes would not use the same bytes; gives the reason.
    """
    if not architecture.shares_base:
        raise SharingError(f"one copy of the base has not been tried with {architecture.name}")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, NVFP4Linear)}
    builder = LayoutBuilder()
    for parts in _fused(layers, architecture):
        rows, columns = [layers[part].out_features for part in parts], layers[parts[0]].in_features
        backend = _common_backend(parts, rows, columns, device, dtype, kernel, other)
        whole = all(count % backend.fused_row_multiple == 0 for count in rows[:-1])
        if not whole:  # the rollout computes each projection by itself, so each needs the backend
            for part, count in zip(parts, rows, strict=True):
                _common_backend((part,), (count,), columns, device, dtype, kernel, other)
        builder.add_group(parts, rows, columns, backend.name, whole)
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
        model: the model for which ``layout`` was planned. It cannot be used afterwards.
        path: the checkpoint folder.
        layout: from :func:`plan_layout`.
        memory: a block of the layout's size, on the device that computes.
        dtype: dtype of everything that is not packed.
        compute_dtype: dtype of the activations.
        kernel: this process's kernel setting.

    Returns:
        The layout with the global scales, and a description of the chosen kernels.

    Raises:
        ValueError: the checkpoint does not belong to this model.
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
        torch.cuda.synchronize(device)  # the other process reads on its own streams
    return replace(layout, groups=tuple(groups)), kernels


def attach(model: nn.Module, layout: Layout, data: torch.Tensor) -> None:
    """Makes a model use a base in memory.

    Shared tensors become plain attributes of the model's modules. They are not parameters, so no
    code moves, shards or saves them. The other tensors are copied.

    Args:
        model: has empty weights, and belongs to the checkpoint that ``data`` holds. Modules that
            the checkpoint does not have stay as they are; tensors that the model does not have are
            skipped.
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
    """Yields the names of the linears that a rollout engine fuses, or of one linear by itself.

    Raises:
        SharingError: only some projections of a fused linear are in NVFP4.
    """
    done: set[str] = set()
    for name in layers:
        if name in done:
            continue
        parts: tuple[str, ...] = (name,)
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
        SharingError: the processes choose different ones.
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
    return get_backend(theirs.name)


def _replace(model: nn.Module, parameter: nn.Parameter, tensor: torch.Tensor) -> None:
    """Replaces a parameter by another one or by a plain tensor, in each module that has it.

    Several modules have it where weights are tied.
    """
    for module in model.modules():
        for leaf, found in list(module._parameters.items()):
            if found is parameter:
                delattr(module, leaf)
                setattr(module, leaf, tensor)
