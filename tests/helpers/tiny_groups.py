"""Packed experts and rows sorted by expert, for the operators of a mixture's linears."""

from __future__ import annotations

import torch

from qerl_verl.kernels.backends import get_backend
from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_grouped_linear import ExpertWeights, Groups
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4

COUNT, N, K = 5, 48, 32
ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Relative, of norms: sums of K products, rounded once or twice."""


def make_weights(parts=2, n=N, k=K, device="cpu", backend="pytorch"):
    """Returns packed experts and the same matrices in float64, ``[E, N, K]``. No two projections
    have the same global scale."""
    generator = torch.Generator().manual_seed(0)
    packed, scale, inverse_scales, plain = [], [], [], []
    for i in range(COUNT * parts):
        weight = torch.randn(n // parts, k, generator=generator) * 0.02 * (1 + i)
        divisor = nvfp4_global_scale(weight.abs().max())
        p, s = quantize_nvfp4(weight, divisor)
        packed.append(p)
        scale.append(s.view(torch.uint8))
        inverse_scales.append(1.0 / divisor.double())
        plain.append(dequantize_nvfp4(p, s, divisor, torch.float64))
    backend = get_backend(backend)
    pair = backend.prepack(torch.cat(packed).to(device), torch.cat(scale).to(device))
    weights = ExpertWeights(*pair, torch.stack(inverse_scales).view(COUNT, parts).to(device), backend)
    return weights, torch.cat(plain).view(COUNT, n, k).to(device)


def make_rows(dtype, tokens=23, k=K, device="cpu"):
    """Rows sorted by expert, of which one gets none; values that the dtype holds."""
    generator = torch.Generator().manual_seed(1)
    experts = torch.randint(COUNT - 1, (tokens,), generator=generator)
    experts = torch.sort(experts + (experts >= 2))[0].to(device)  # none for expert 2
    x = torch.randn(tokens, k, generator=generator).to(dtype).to(device)
    return x, Groups.of(experts, COUNT)


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()
