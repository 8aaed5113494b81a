"""Keeps the adapter on the experts of a vLLM layer in static buffers, which a weight sync
overwrites.

As in :mod:`qerl_verl.rollout.lora`, one policy has one adapter, and the adapter is part of the
layer. Tensor-parallel ranks have a part of each expert's intermediate channels: rows of B of gate
and up, and columns of A of down, whose partial results vLLM sums anyway. Expert-parallel ranks have
whole experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch

from qerl_verl.kernels.nvfp4_experts import ExpertAdapter
from qerl_verl.rollout.linear_lora import Shard

_BUFFERS = tuple(field.name for field in fields(ExpertAdapter) if field.name != "scaling")
_PREFIX = "qerl_lora_"
_PARTS = {
    ("gate_up_proj", "A"): "gate_up_a",
    ("gate_up_proj", "B"): "gate_up_b",
    ("down_proj", "A"): "down_a",
    ("down_proj", "B"): "down_b",
}
"""Stack and part, as :func:`qerl_verl.lora.experts.parse_stacked` names them -> buffer."""


def attach_expert_adapter(layer: torch.nn.Module, name: str, adapter: ExpertAdapter) -> None:
    """Gives a layer the buffers of an adapter.

    Args:
        layer: vLLM's ``RoutedExperts``.
        name: its full name, without vLLM's own module inside it.
        adapter: adapter of this rank's experts, all zero.
    """
    for buffer in _BUFFERS:
        layer.register_buffer(f"{_PREFIX}{buffer}", getattr(adapter, buffer), persistent=False)
    layer.qerl_lora_experts, layer.qerl_lora_scaling = name, adapter.scaling


def expert_adapter(layer: torch.nn.Module) -> ExpertAdapter | None:
    """Returns the adapter in a layer, or None where the layer has no buffers."""
    if getattr(layer, "qerl_lora_experts", None) is None:
        return None
    buffers = {buffer: getattr(layer, f"{_PREFIX}{buffer}") for buffer in _BUFFERS}
    return ExpertAdapter(**buffers, scaling=layer.qerl_lora_scaling)


def cut_expert_adapter(
    layer: torch.nn.Module, parts: Mapping[tuple[str, str], torch.Tensor], scaling: float, shard: Shard
) -> dict[str, torch.Tensor]:
    """Returns buffer -> the part of an adapter for the buffer, in its shape.

    Args:
        layer: vLLM's ``RoutedExperts``.
        parts: ``(stack, "A")`` and ``(stack, "B")`` of all experts. An adapter without them gives
            zeros.
        scaling: the adapter's own scaling.
        shard: see :data:`qerl_verl.rollout.linear_lora.Shard`.

    Raises:
        ValueError: a part is missing, has another shape, or a rank beyond that of the buffers.
    """
    room = expert_adapter(layer)
    assert room is not None, "the layer has no buffers"
    new = {buffer: torch.zeros_like(getattr(room, buffer)) for buffer in _BUFFERS}
    if not parts:
        return new
    if lacking := sorted(" ".join(key) for key in _PARTS.keys() - parts.keys()):
        raise ValueError(f"it has no {', '.join(lacking)}")
    count = layer.global_num_experts
    gate_up_a, gate_up_b, down_a, down_b = (parts[key] for key in _PARTS)
    rank, (_, hidden, most), inner = down_b.shape[-1], room.down_b.shape, down_a.shape[-1]
    shapes = (count, 2 * rank, hidden), (count, 2 * inner, rank), (count, rank, inner), (count, hidden, rank)
    if rank > most or any(tuple(parts[key].shape) != shape for key, shape in zip(_PARTS, shapes, strict=True)):
        raise ValueError(
            f"it has {', '.join(str(tuple(parts[key].shape)) for key in _PARTS)}; the rollout has "
            f"{count} experts of {hidden} channels and room for rank {most}: set "
            "actor_rollout_ref.model.lora_rank to the adapter's rank"
        )
    gate_b, up_b = (shard(half, 1, room.down_a.shape[-1]) for half in gate_up_b.chunk(2, 1))
    down_a = shard(down_a, 2, room.down_a.shape[-1])
    own = _own_experts(layer, count)
    device = room.down_b.device
    gate_a, up_a, gate_b, up_b, down_a, down_b = (
        t[own].to(device).float() for t in (*gate_up_a.chunk(2, 1), gate_b, up_b, down_a, down_b)
    )
    # The kernel takes gate's factor for up as well and corrects that in down's
    # (qerl_verl.kernels.nvfp4_experts.expert_factors), so what it holds as up is larger by this.
    gate_scale, up_scale = layer.w13_weight_global_scale.data.float().to(device).unbind(1)
    larger = (up_scale / gate_scale)[:, None, None]
    factor = scaling / layer.qerl_lora_scaling  # that one is part of captured graphs
    new["gate_up_a"].view(len(gate_a), 2, most, hidden)[:, :, :rank] = torch.stack((gate_a, up_a), 1)
    new["gate_up_b"][..., :rank] = torch.cat((gate_b, up_b * larger), 1) * factor
    new["down_a"][:, :rank] = down_a / larger
    new["down_b"][..., :rank] = down_b * factor
    return new


def write_expert_adapter(layer: torch.nn.Module, new: Mapping[str, torch.Tensor]) -> None:
    """Overwrites the buffers with the result of :func:`cut_expert_adapter`."""
    for buffer, tensor in new.items():
        getattr(layer, f"{_PREFIX}{buffer}").copy_(tensor)


def _own_experts(layer: torch.nn.Module, count: int) -> torch.Tensor:
    """Returns the numbers of this rank's experts, in their order on this rank."""
    if layer.expert_map is None:
        return torch.arange(count)
    local = layer.expert_map.cpu()
    mine = torch.nonzero(local >= 0)[:, 0]
    return mine[local[mine].argsort()]
