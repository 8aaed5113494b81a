"""Computes the linears of a mixture of experts with one LoRA adapter for each expert:
y_s = p_s (f_e W_e x_s + scaling B_e A_e x_s), e the expert of row s.

Rows are sorted by expert, as in :mod:`qerl_verl.kernels.nvfp4_grouped_linear`, which has the base.
The low-rank factors of all experts are 3-D tensors, multiplied by grouped GEMMs
(``torch.nn.functional.grouped_mm``) on a GPU and expert by expert elsewhere.
"""

from __future__ import annotations

import torch

from qerl_verl.kernels.nvfp4_grouped_linear import (
    ExpertWeights,
    Groups,
    _scaled,
    _wide,
    grouped_mm,
    uses_grouped_mm,
)
from qerl_verl.kernels.recompute import differentiable, placeholder


def grouped_dense_mm(x: torch.Tensor, weight: torch.Tensor, groups: Groups, transposed: bool = False) -> torch.Tensor:
    """Returns ``x_s W_e^T``, or with ``transposed`` ``x_s W_e``.

    Args:
        x: ``[S, K]``, or with ``transposed`` ``[S, N]``, sorted by expert.
        weight: ``[E, N, K]``, of the same dtype.
        groups: of the rows.

    Returns:
        ``[S, N]``, or ``[S, K]``.
    """
    weight = weight if transposed else weight.transpose(-2, -1)
    if len(x) and uses_grouped_mm(x, *weight.shape[1:]):
        return torch.nn.functional.grouped_mm(x.contiguous(), weight, offs=groups.ends)
    y, begin = x.new_empty(len(x), weight.shape[2]), 0
    for expert, end in enumerate(groups.ends.tolist()):
        if end > begin:
            torch.mm(x[begin:end], weight[expert], out=y[begin:end])
        begin = end
    return y


def grouped_outer(left: torch.Tensor, right: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Returns ``sum_s left_s^T right_s`` over the rows of each expert; zero for an expert without
    rows.

    Args:
        left: ``[S, M]``, sorted by expert.
        right: ``[S, N]``, of the same dtype.
        groups: of the rows.

    Returns:
        ``[E, M, N]``.
    """
    shape = len(groups.ends), left.shape[1], right.shape[1]
    if len(left) and uses_grouped_mm(left, *shape[1:]):
        out = torch.nn.functional.grouped_mm(left.contiguous().t(), right.contiguous(), offs=groups.ends)
        rows = torch.diff(groups.ends, prepend=groups.ends.new_zeros(1))
        return out.masked_fill_((rows == 0)[:, None, None], 0)
    out, begin = left.new_zeros(shape), 0
    for expert, end in enumerate(groups.ends.tolist()):
        if end > begin:
            torch.mm(left[begin:end].t(), right[begin:end], out=out[expert])
        begin = end
    return out


def _parts(t: torch.Tensor, count: int, dim: int) -> list[torch.Tensor]:
    return [t] if count == 1 else [part.contiguous() for part in t.chunk(count, dim)]


class _NVFP4LoraGroupedLinear(torch.autograd.Function):
    """The node of :func:`nvfp4_lora_grouped_linear`. Saves x, the packed weights, A and B in x's
    dtype, and u = scaling p A x; nothing of the base in 16 bits.

    With v = (f W + scaling B A)^T grad, the gradient of x is p v and that of p is <v, x>.
    """

    @staticmethod
    def forward(
        ctx, x, row_weights, packed, scale, inverse_scales, experts, ends, lora_a, lora_b, a, b, u, scaling, backend
    ):
        ctx.save_for_backward(x, row_weights, packed, scale, inverse_scales, experts, ends, a, b, u)
        ctx.scaling, ctx.backend, ctx.dtypes = scaling, backend, (lora_a.dtype, lora_b.dtype)
        return placeholder(x, packed.shape[0] // len(inverse_scales))

    @staticmethod
    def backward(ctx, grad):
        x, row_weights, packed, scale, inverse_scales, experts, ends, a, b, u = ctx.saved_tensors
        weights, groups, parts = (
            ExpertWeights(packed, scale, inverse_scales, ctx.backend),
            Groups(experts, ends),
            inverse_scales.shape[1],
        )
        grad = grad.contiguous()
        grads, bs, us = (_parts(t, parts, dim) for t, dim in ((grad, 1), (b, 1), (u, 1)))
        grad_u = torch.cat([grouped_dense_mm(g, b_, groups, True) for g, b_ in zip(grads, bs, strict=True)], 1)
        grad_u.mul_(ctx.scaling)
        grad_x = grad_weights = grad_a = grad_b = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_base = _scaled(grad, weights.factors(grad.dtype).to(_wide(grad.dtype))[experts])
            grad_x = grouped_mm(of_base, weights, groups, transposed=True)
            grad_x = grad_x.add_(grouped_dense_mm(grad_u, a, groups, True))
        if row_weights is not None:
            if ctx.needs_input_grad[1]:
                grad_weights = (grad_x * x).sum(-1, dtype=_wide(x.dtype)).to(row_weights.dtype)
            rows = row_weights.to(x.dtype).unsqueeze(-1)
            grad_x = None if grad_x is None else grad_x * rows
            grad_u = grad_u * rows
        if ctx.needs_input_grad[7]:
            grad_a = grouped_outer(grad_u, x, groups).to(ctx.dtypes[0])
        if ctx.needs_input_grad[8]:
            of_parts = [grouped_outer(g, u_, groups) for g, u_ in zip(grads, us, strict=True)]
            grad_b = torch.cat(of_parts, 1).to(ctx.dtypes[1])
        return grad_x, grad_weights, *[None] * 5, grad_a, grad_b, *[None] * 5


def nvfp4_lora_grouped_linear(
    x: torch.Tensor,
    weights: ExpertWeights,
    groups: Groups,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    row_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns ``y_s = p_s (W_e x_s / global_scale_e + scaling B_e A_e x_s)``, differentiable in
    ``x``, ``lora_a``, ``lora_b`` and ``row_weights``.

    The P projections of a weight have an A and a B each; their rows lie behind each other.

    Args:
        x: ``[S, K]`` bfloat16, float16, float32 or float64, sorted by expert.
        weights: of the experts, ``[N, K]`` each.
        groups: of the rows.
        lora_a: ``[E, P * rank, K]``; cast to ``x.dtype``, its gradient comes in its own dtype.
        lora_b: ``[E, N, rank]``, likewise.
        scaling: lora_alpha / rank.
        row_weights: p, ``[S]`` floating point, or None for ones.

    Returns:
        ``[S, N]`` in ``x.dtype``.
    """
    parts = weights.inverse_scales.shape[1]
    with torch.no_grad():
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        u = grouped_dense_mm(x, a, groups).mul_(scaling)
        if row_weights is not None:
            u.mul_(row_weights.to(x.dtype).unsqueeze(-1))

    def compute() -> torch.Tensor:
        y = grouped_mm(x, weights, groups)
        factors = weights.factors(x.dtype).to(_wide(x.dtype))[groups.experts]
        if row_weights is not None:
            factors = factors * row_weights.to(factors.dtype).unsqueeze(-1)
        y = _scaled(y, factors, out=y)
        for part, u_, b_ in zip(y.chunk(parts, 1), _parts(u, parts, 1), _parts(b, parts, 1), strict=True):
            part.add_(grouped_dense_mm(u_, b_, groups))
        return y

    base = (x, row_weights, weights.packed, weights.scale, weights.inverse_scales, groups.experts, groups.ends)
    inputs = (*base, lora_a, lora_b, a, b, u, scaling, weights.backend)
    return differentiable(_NVFP4LoraGroupedLinear, inputs, compute)
