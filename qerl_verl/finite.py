"""Checks that stop a run at the first NaN or Inf, and name the tensor, before the value reaches the
weights, a checkpoint or the rollout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or an adapter tensor is NaN or Inf. The message names the role, the
    step and the tensor."""


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a DTensor, and any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_nonfinite(tensors: Iterable[tuple[str, Any]]) -> str | None:
    """Returns the name of the first floating-point tensor that holds a NaN or an Inf, or None. Only
    this rank's shard of a DTensor is examined.

    Args:
        tensors: names and values. Values other than floating-point tensors are skipped; of a jagged
            tensor the values are examined.
    """
    checked = []
    for name, value in tensors:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value = local(value.values() if value.is_nested else value)
            if value.numel():
                checked.append((name, value))
    # A NaN or an Inf makes the sum NaN or Inf: one pass over the memory, and one wait for each
    # device.
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for _, value in checked:
        sums.setdefault(value.device, []).append(
            value.sum(dtype=torch.promote_types(value.dtype, torch.float32)).double()
        )
    if all(torch.isfinite(torch.stack(of_device)).all() for of_device in sums.values()):
        return None
    return next((name for name, value in checked if not torch.isfinite(value).all()), None)


def gradient_norms(module: torch.nn.Module) -> tuple[list[str], torch.Tensor | None]:
    """Returns the names of the parameters with a gradient, and the norms of this rank's shards,
    ``[names]`` float32 on their device.

    Nothing is copied to the host. The norms are None where this rank holds no gradient.
    """
    named = [(n, local(p.grad)) for n, p in module.named_parameters() if p.grad is not None]
    named = [(n, g) for n, g in named if g.numel()]
    if not named:
        return [], None
    norms = torch._foreach_norm([g for _, g in named])
    return [n for n, _ in named], torch.stack([n.float() for n in norms])


def gather_first(name: str | None, group=None) -> str | None:
    """Returns the first name that any rank of the group found. A collective call."""
    names: list[str | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(names, name, group=group)
    return next((n for n in names if n is not None), None)


def named_tensors(*groups: tuple[str, Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
    """Flattens nested values: ``("batch", {"returns": t})`` gives ``("batch.returns", t)``."""
    for prefix, group in groups:
        for name in group.keys():
            yield f"{prefix}.{name}", group[name]
