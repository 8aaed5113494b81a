"""Computes ``y = x W^T + b`` with an NVFP4 weight, forward and backward, in plain PyTorch.

Plain PyTorch is the reference of the training layer and runs where no faster kernel exists. A
backend brings its own kernels and layout. If the weight is decoded to 16 bits, the copy lives for
one GEMM: the backward pass decodes the packed bytes again.
"""

from __future__ import annotations

import torch

from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.recompute import differentiable, placeholder


class _NVFP4Linear(torch.autograd.Function):
    """The autograd node of :func:`nvfp4_linear`."""

    @staticmethod
    def forward(ctx, x, packed, scale, global_scale, bias, backend):
        ctx.save_for_backward(packed, scale)
        ctx.global_scale, ctx.backend = global_scale, backend
        return placeholder(x, packed.shape[0])

    @staticmethod
    def backward(ctx, grad):
        packed, scale = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            block_values = block_values_nvfp4 if ctx.backend is None else ctx.backend.block_values
            weight = block_values(packed, scale, grad.dtype)
            grad_x = scaled_mm(grad.reshape(-1, grad.shape[-1]), weight, 1.0 / ctx.global_scale, None)
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, None, grad_bias, None


def scaled_mm(a: torch.Tensor, b: torch.Tensor, factor: float, bias: torch.Tensor | None) -> torch.Tensor:
    """Returns ``factor * a @ b + bias``, with ``factor`` applied to the accumulator before the one
    rounding of the output."""
    if bias is None:
        return torch.addmm(a.new_empty(b.shape[1]), a, b, beta=0, alpha=factor)  # beta 0: not read
    return torch.addmm(bias.to(a.dtype), a, b, alpha=factor)


def nvfp4_linear_reference(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the forward pass of :func:`nvfp4_linear` without autograd, in the checkpoint's
    layout."""
    values = block_values_nvfp4(weight.packed, weight.scale, x.dtype)
    y = scaled_mm(x.reshape(-1, x.shape[-1]), values.t(), 1.0 / weight.global_scale, bias)
    return y.view(*x.shape[:-1], values.shape[0])


def nvfp4_linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, backend=None) -> torch.Tensor:
    """Returns ``y = x (e2m1 * scale)^T / global_scale + bias``, differentiable in ``x`` and
    ``bias``.

    Saves the packed values and scales for the backward pass, nothing in 16 bits.

    Args:
        x: ``[..., K]`` bfloat16, float16, float32 or float64.
        weight: ``[N, K]``, in the layout of ``backend``.
        bias: ``[N]`` or None.
        backend: of :mod:`qerl_verl.kernels.backends`; None is plain PyTorch on the checkpoint's
            layout.

    Returns:
        ``[..., N]`` in ``x.dtype``.
    """
    linear = nvfp4_linear_reference if backend is None else backend.linear
    bias = None if bias is None else bias.to(x.dtype)

    def compute() -> torch.Tensor:
        return linear(x, weight, bias)

    return differentiable(_NVFP4Linear, (x, *weight, bias, backend), compute)
