"""Computes the linears of a mixture of experts, y_s = f_s W_e(s) x_s, with the NVFP4 weights of all
experts.

Rows are sorted by expert. On a GPU the weights of all experts are decoded for the duration of one
grouped GEMM (``torch.nn.functional.grouped_mm``); the reference decodes one expert at a time. The
backward pass decodes again, so no 16-bit copy outlives a call.

This module is the training side: one differentiable linear, whose weights are in a backend's
layout. The rollout's whole mixture is :mod:`qerl_verl.kernels.nvfp4_experts`, where vLLM's layout
needs another rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qerl_verl.kernels.recompute import differentiable, placeholder

_ALIGNMENT = 8
"""Elements. ``grouped_mm`` takes rows that begin at multiples of 16 bytes
(aten/src/ATen/native/cuda/GroupedBlas.cpp)."""


@dataclass(frozen=True)
class Groups:
    """The rows of each expert.

    Attributes:
        experts: ``[S]`` int64, ascending: the expert of each row.
        ends: ``[E]`` int32, the row at which the rows of each expert end.
    """

    experts: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def of(cls, experts: torch.Tensor, count: int) -> Groups:
        """Returns the groups for the sorted expert number of each row and the number of experts.
        Does not synchronize.
        """
        every = torch.arange(count, device=experts.device)
        return cls(experts, torch.searchsorted(experts, every, right=True).int())


class ExpertWeights:
    """The weights of one linear of all experts.

    Args:
        packed: ``[E * N, K / 2]`` uint8 in the backend's layout.
        scale: ``[E * N, K / 16]`` uint8, likewise.
        inverse_scales: ``[E, P]`` float64, 1 / ``weight_global_scale`` of each of the P projections
            whose N / P rows each lie behind each other in an expert.
        backend: of :mod:`qerl_verl.kernels.backends`.
    """

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor, inverse_scales: torch.Tensor, backend):
        self.packed, self.scale, self.inverse_scales, self.backend = packed, scale, inverse_scales, backend
        self.count = len(inverse_scales)
        self.n, self.k = packed.shape[0] // self.count, packed.shape[1] * 2

    def factors(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns ``[E, P]``, what a GEMM's output is multiplied by: ``inverse_scales``, or 1 in
        float16, whose range the outputs of unscaled weights would leave."""
        return torch.ones_like(self.inverse_scales) if dtype == torch.float16 else self.inverse_scales

    def decode(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns ``e2m1 * scale`` of all experts, ``[E, N, K]``; in float16 the weights
        themselves."""
        values = self.backend.block_values(self.packed, self.scale, dtype).view(self.count, self.n, self.k)
        return self._apply_inverse_scales(values, self.inverse_scales) if dtype == torch.float16 else values

    def decode_one(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns the same of one expert, ``[N, K]``."""
        if self.n % self.backend.fused_row_multiple:  # its bytes do not lie together
            return self.decode(dtype)[expert]
        rows = slice(expert * self.n, (expert + 1) * self.n)
        values = self.backend.block_values(self.packed[rows], self.scale[rows], dtype)
        if dtype != torch.float16:
            return values
        return self._apply_inverse_scales(values.unsqueeze(0), self.inverse_scales[expert : expert + 1])[0]

    @staticmethod
    def _apply_inverse_scales(values: torch.Tensor, inverse_scales: torch.Tensor) -> torch.Tensor:
        parts = values.view(len(values), inverse_scales.shape[1], -1, values.shape[-1])
        return (parts * inverse_scales.float()[..., None, None]).to(values.dtype).view(values.shape)


def uses_grouped_mm(x: torch.Tensor, n: int, k: int) -> bool:
    """Returns whether ``grouped_mm`` computes the rows of ``x``: bfloat16 on an NVIDIA GPU."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and n % _ALIGNMENT == 0
        and k % _ALIGNMENT == 0
    )


def grouped_mm(x: torch.Tensor, weights: ExpertWeights, groups: Groups, transposed: bool = False) -> torch.Tensor:
    """Returns ``x_s W^T``, or ``x_s W``, with W as :meth:`ExpertWeights.decode` gives it for the
    row's expert.

    Args:
        x: ``[S, K]``, or with ``transposed`` ``[S, N]``.
        weights: the experts' weights.
        groups: the rows of each expert.
        transposed: multiply by W and not by its transpose.

    Returns:
        ``[S, N]``, or ``[S, K]``.
    """
    if len(x) and uses_grouped_mm(x, weights.n, weights.k):
        weight = weights.decode(x.dtype)
        weight = weight if transposed else weight.transpose(-2, -1)
        return torch.nn.functional.grouped_mm(x, weight, offs=groups.ends)
    return grouped_mm_reference(x, weights, groups, transposed)


def grouped_mm_reference(
    x: torch.Tensor, weights: ExpertWeights, groups: Groups, transposed: bool = False
) -> torch.Tensor:
    """Computes :func:`grouped_mm` one expert at a time. Reads ``groups`` on the host."""
    y, begin = x.new_empty(len(x), weights.k if transposed else weights.n), 0
    for expert, end in enumerate(groups.ends.tolist()):
        if end > begin:
            weight = weights.decode_one(expert, x.dtype)
            torch.mm(x[begin:end], weight if transposed else weight.t(), out=y[begin:end])
        begin = end
    return y


def _scaled(t: torch.Tensor, factors: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``t`` ``[S, N]`` times ``factors`` ``[S, P]`` for each of P equal parts of its
    columns, computed in float32 (float64 for float64) and rounded once."""
    shape = len(t), factors.shape[1], t.shape[1] // factors.shape[1]
    out = torch.empty_like(t) if out is None else out
    torch.mul(t.view(shape), factors.unsqueeze(-1), out=out.view(shape))
    return out


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _NVFP4GroupedLinear(torch.autograd.Function):
    """The node of :func:`nvfp4_grouped_linear`. Saves the packed weights, and x where the row
    weights need it; nothing of the base in 16 bits.

    The gradient of a row weight needs no output: with u = W^T (grad / global_scale) it is <u, x>,
    and that of x is the row weight times u.
    """

    @staticmethod
    def forward(ctx, x, row_weights, packed, scale, inverse_scales, experts, ends, backend):
        saved = (None, None) if row_weights is None else (x, row_weights)
        ctx.save_for_backward(*saved, packed, scale, inverse_scales, experts, ends)
        ctx.backend = backend
        return placeholder(x, packed.shape[0] // len(inverse_scales))

    @staticmethod
    def backward(ctx, grad):
        x, row_weights, packed, scale, inverse_scales, experts, ends = ctx.saved_tensors
        weights, groups = ExpertWeights(packed, scale, inverse_scales, ctx.backend), Groups(experts, ends)
        grad = _scaled(grad.contiguous(), weights.factors(grad.dtype).to(_wide(grad.dtype))[experts])
        grad_x = grouped_mm(grad, weights, groups, transposed=True)
        grad_weights = None
        if row_weights is not None:
            if ctx.needs_input_grad[1]:
                dots = (grad_x * x).sum(-1, dtype=_wide(grad_x.dtype))
                grad_weights = dots.to(row_weights.dtype)
            grad_x = grad_x * row_weights.to(grad_x.dtype).unsqueeze(-1)
        return grad_x, grad_weights, *[None] * 6


def nvfp4_grouped_linear(
    x: torch.Tensor, weights: ExpertWeights, groups: Groups, row_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns ``y_s = row_weights_s / global_scale_e(s) * W_e(s) x_s``, differentiable in ``x`` and
    ``row_weights``.

    Args:
        x: ``[S, K]`` bfloat16, float16, float32 or float64, sorted by expert.
        weights: the experts' weights.
        groups: the rows of each expert.
        row_weights: ``[S]`` floating point, or None for ones.

    Returns:
        ``[S, N]`` in ``x.dtype``.
    """

    def compute() -> torch.Tensor:
        y = grouped_mm(x, weights, groups)
        factors = weights.factors(x.dtype).to(_wide(x.dtype))[groups.experts]
        if row_weights is not None:
            factors = factors * row_weights.to(factors.dtype).unsqueeze(-1)
        return _scaled(y, factors, out=y)

    inputs = (x, row_weights, weights.packed, weights.scale, weights.inverse_scales, *(groups.experts, groups.ends))
    return differentiable(_NVFP4GroupedLinear, (*inputs, weights.backend), compute)


class Dispatch(torch.autograd.Function):
    """The tokens of each expert, one behind the other: ``[T, H]`` to ``[T * k, H]``.

    The gradients of a token's k rows are added up in the order of its experts, without atomics.
    """

    @staticmethod
    def forward(ctx, hidden, order, inverse, k):
        ctx.save_for_backward(inverse)
        ctx.k = k
        return hidden[order // k]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return _add_up(grad, inverse, ctx.k), None, None, None


class Combine(torch.autograd.Function):
    """The sum of each token's k rows: ``[T * k, H]`` sorted by expert to ``[T, H]``.

    The order is an attribute and no saved tensor, for with activation checkpointing a layer's
    second run goes on up to the last saved tensor, and would compute ``rows`` for this one.
    """

    @staticmethod
    def forward(ctx, rows, order, inverse, k):
        ctx.order, ctx.k = order, k
        return _add_up(rows, inverse, k)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.order // ctx.k], None, None, None


def _add_up(rows: torch.Tensor, inverse: torch.Tensor, k: int) -> torch.Tensor:
    return rows[inverse].view(-1, k, rows.shape[-1]).sum(1)
