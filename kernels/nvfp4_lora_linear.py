"""Computes an NVFP4 linear layer with one LoRA adapter: ``y = x W^T + b + scaling (x A^T) B^T``.

There are two forms:

* :func:`add_lora_reference` adds the LoRA delta of fused projections, as the rollout engine has
  them: an A and a B for each of q, k and v on one weight;
* :func:`nvfp4_lora_linear` is forward and backward as one autograd function, for training.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.recompute import differentiable, placeholder


def add_lora_reference(
    y: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, ends: Sequence[int], scaling: float
) -> torch.Tensor:
    """Adds ``scaling (x A_i^T) B_i^T`` to the columns of ``y`` that belong to fused projection
    ``i``; overwrites ``y``.

    Args:
        y: ``[..., N]``.
        x: ``[..., K]``, of the same dtype.
        lora_a: ``[projections * rank, K]``, the A of each projection in turn.
        lora_b: ``[N, rank]``, the B of each projection in turn.
        ends: the row of the weight at which each projection ends; the last is N.
        scaling: lora_alpha / rank.
    """
    rank = lora_b.shape[1]
    rows = y.view(-1, y.shape[-1])
    u = x.reshape(-1, x.shape[-1]) @ lora_a.t()
    begin = 0
    for i, end in enumerate(ends):
        rows[:, begin:end].addmm_(u[:, i * rank : (i + 1) * rank], lora_b[begin:end].t(), alpha=scaling)
        begin = end
    return y


def scaled(t: torch.Tensor, factor: float) -> torch.Tensor:
    """Returns ``factor * t`` in place; launches no kernel for a factor of 1."""
    return t if factor == 1 else t.mul_(factor)


class _NVFP4LoraLinear(torch.autograd.Function):
    """The autograd node of :func:`nvfp4_lora_linear`.

    Saves x, the packed weight, A and B in x's dtype, and u = scaling x A^T; nothing of the base in
    16 bits.
    """

    @staticmethod
    def forward(ctx, x, packed, scale, global_scale, bias, lora_a, lora_b, a, b, u, scaling, backend):
        ctx.save_for_backward(x, packed, scale, a, b, u)
        ctx.global_scale, ctx.scaling, ctx.backend = global_scale, scaling, backend
        ctx.dtypes = lora_a.dtype, lora_b.dtype
        return placeholder(x, packed.shape[0])

    @staticmethod
    def backward(ctx, grad):
        x, packed, scale, a, b, u = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_u = scaled(grad @ b, ctx.scaling)
        grad_x = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            weight = ctx.backend.block_values(packed, scale, grad.dtype)
            grad_x = (grad_u @ a).addmm_(grad, weight, alpha=1.0 / ctx.global_scale).view(x.shape)
        if ctx.needs_input_grad[5]:
            grad_a = (grad_u.t() @ x.reshape(-1, x.shape[-1])).to(ctx.dtypes[0])
        if ctx.needs_input_grad[6]:
            grad_b = (grad.t() @ u).to(ctx.dtypes[1])
        grad_bias = grad.sum(0) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, None, grad_bias, grad_a, grad_b, *[None] * 5


def nvfp4_lora_linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    backend,
) -> torch.Tensor:
    """Returns ``x W^T + bias + scaling (x A^T) B^T``, differentiable in ``x``, ``bias``, ``lora_a``
    and ``lora_b``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``, in the layout of ``backend``.
        bias: ``[N]`` or None.
        lora_a: ``[rank, K]``; cast to ``x.dtype``, its gradient comes in its own dtype.
        lora_b: ``[N, rank]``, likewise.
        scaling: lora_alpha / rank.
        backend: of :mod:`qerl_verl.kernels.backends`.

    Returns:
        ``[..., N]`` in ``x.dtype``.
    """
    bias = None if bias is None else bias.to(x.dtype)
    with torch.no_grad():
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        u = scaled(rows @ a.t(), scaling)

    def compute() -> torch.Tensor:
        n, k = weight.packed.shape[0], rows.shape[1]
        if not backend.decodes_first(len(rows), n, k):
            return backend.linear(rows, weight, bias).addmm_(u, b.t()).view(*x.shape[:-1], n)
        # The LoRA delta comes first: the large GEMM adds to it while it computes, which saves a
        # pass over y.
        y = u @ b.t() if bias is None else torch.addmm(bias, u, b.t())
        return backend.add_linear(y, rows, weight).view(*x.shape[:-1], n)

    inputs = (x, *weight, bias, lora_a, lora_b, a, b, u, scaling, backend)
    return differentiable(_NVFP4LoraLinear, inputs, compute)
