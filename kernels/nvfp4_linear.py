"""y = x W^T + b with an NVFP4 weight, forward and backward, in plain PyTorch.

Plain PyTorch is the reference of the training layer and runs where no faster kernel exists; a backend brings its own
kernels and layout. Where the weight is unpacked, then for the duration of one matrix product; the backward pass unpacks it
again from the packed bytes, so no 16-bit copy outlives a call.
"""

from __future__ import annotations

import torch

from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.recompute import differentiable, placeholder


class _NVFP4Linear(torch.autograd.Function):
    """The node of :func:`nvfp4_linear`."""

    @staticmethod
    def forward(ctx, x, packed, scale, alpha, bias, backend):
        ctx.save_for_backward(packed, scale)
        ctx.alpha, ctx.backend = alpha, backend
        return placeholder(x, packed.shape[0])

    @staticmethod
    def backward(ctx, grad):
        packed, scale = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            block_values = block_values_nvfp4 if ctx.backend is None else ctx.backend.block_values
            weight = block_values(packed, scale, grad.dtype)
            grad_x = scaled_mm(grad.reshape(-1, grad.shape[-1]), weight, ctx.alpha, None)
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[4] else None
        return grad_x, None, None, None, grad_bias, None


def scaled_mm(a: torch.Tensor, b: torch.Tensor, alpha: float, bias: torch.Tensor | None) -> torch.Tensor:
    """``alpha * a @ b + bias`` with ``alpha`` applied to the accumulator, before the one rounding of the output."""
    if bias is None:
        return torch.addmm(a.new_empty(b.shape[1]), a, b, beta=0, alpha=alpha)  # beta 0: not read
    return torch.addmm(bias.to(a.dtype), a, b, alpha=alpha)


def nvfp4_linear_reference(x, packed, scale, alpha, bias=None) -> torch.Tensor:
    """The forward pass of :func:`nvfp4_linear` without autograd."""
    weight = block_values_nvfp4(packed, scale, x.dtype)
    y = scaled_mm(x.reshape(-1, x.shape[-1]), weight.t(), alpha, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def nvfp4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    alpha: float,
    bias: torch.Tensor | None = None,
    backend=None,
) -> torch.Tensor:
    """``y = alpha * x (e2m1 * scale)^T + bias``, differentiable in ``x`` and ``bias``.

    Args:
        x: ``[..., K]`` bfloat16, float16, float32 or float64.
        packed: ``[N, K / 2]`` uint8, two E2M1 codes a byte, low nibble first.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8.
        alpha: 1 / ``weight_global_scale``, applied to the accumulator.
        bias: ``[N]`` or None.
        backend: of :mod:`qerl_verl.kernels.backends`, in whose layout the weight is then; None is plain PyTorch on the
            checkpoint's layout.

    Returns:
        ``[..., N]`` in ``x.dtype``. Saves ``packed`` and ``scale`` for the backward pass, nothing in 16 bits.
    """
    linear = nvfp4_linear_reference if backend is None else backend.linear
    bias = None if bias is None else bias.to(x.dtype)

    def compute() -> torch.Tensor:
        return linear(x, packed, scale, alpha, bias)

    return differentiable(_NVFP4Linear, (x, packed, scale, alpha, bias, backend), compute)
