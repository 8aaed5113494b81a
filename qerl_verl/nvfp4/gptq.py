"""Implements GPTQ (arXiv 2210.17323) for NVFP4, which minimizes the error of a layer's outputs.

For inputs ``x`` with ``H = sum x x^T`` the output error of a linear is ``tr((W - Q) H (W - Q)^T)``.
GPTQ rounds one input channel at a time and changes the remaining channels so that they compensate
the error. With ``U``, upper triangular, ``U^T U = H^-1``:

    e = (w_i - q_i) / U_ii;    w_j -= e U_ij    for j > i

The rows of W are independent of each other, so linears with the same input are solved together.
NVFP4's block scales are chosen beforehand from the original weight ("static groups"). Channels can
therefore be taken in the order of their importance, ``diag(H)``, and the format needs no
permutation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.kernels.nvfp4_quantize import e2m1_magnitude_codes, e2m1_magnitudes

GPTQ_VERSION = 1
"""Part of the cache key. Raise it when the same weight and Hessian give other bytes."""

DAMPING = 0.01
"""Value added to the Hessian's diagonal, as a fraction of the diagonal's mean; 0.01 in the paper.
"""

_PANEL = 128  # channels whose errors are applied to the rest of the weight in one GEMM
_STRIP = BLOCK_SIZE  # channels that are solved one by one; divides K and the panel


@dataclass
class Hessian:
    """``sum x x^T`` over the inputs of a linear, in float32.

    Attributes:
        sum: ``[K, K]``.
        count: number of inputs in the sum.
    """

    sum: torch.Tensor
    count: int = 0

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> Hessian:
        return cls(torch.zeros(channels, channels, dtype=torch.float32, device=device))

    def add(self, inputs: torch.Tensor) -> None:
        """Adds inputs to the sum.

        Args:
            inputs: ``[tokens, K]`` of any floating-point dtype.
        """
        inputs = inputs.float()
        self.sum.addmm_(inputs.t(), inputs)
        self.count += len(inputs)


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Returns ``U`` ``[K, K]``, upper triangular, with ``U^T U = (H + damping * mean(diag H))^-1``.

    Channels that were never active (``H_ii = 0``) get the identity: they are rounded and affect no
    other channel. With J the matrix that reverses the order, ``J H J = L L^T`` gives
    ``U = J L^-1 J``, which takes one Cholesky factorization and one triangular inverse.

    Args:
        hessian: ``[K, K]`` float32, symmetric, positive semidefinite. It is overwritten.
        damping: raised tenfold until the factorization succeeds.

    Raises:
        ValueError: NaN or Inf in ``hessian``.
    """
    diagonal = hessian.diagonal()
    if not torch.isfinite(diagonal).all():
        raise ValueError("the Hessian holds NaN or Inf")
    diagonal[diagonal == 0] = 1.0
    mean = diagonal.mean().item()
    reverse = hessian.flip(0, 1)
    added = 0.0
    while True:
        reverse.diagonal().add_(damping * mean - added)
        added = damping * mean
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            break
        damping *= 10
    del reverse
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
    del lower, identity
    return inverse.flip(0, 1)


def gptq_codes(
    weight: torch.Tensor, hessian: torch.Tensor, step: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """Returns the E2M1 codes of a weight for given steps.

    Args:
        weight: ``[N, K]``, in any floating-point dtype.
        hessian: ``[K, K]`` float32, of the inputs.
        step: ``[N, K / 16]`` float32 > 0, the unit of the codes: ``block_scale / global_scale``.
        damping: see :data:`DAMPING`.

    Returns:
        ``[N, K]`` uint8.

    Raises:
        ValueError: NaN or Inf in ``hessian``.
    """
    n, k = weight.shape
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], damping)
    group = order // BLOCK_SIZE
    columns = weight.t()[order].float()  # [K, N]: each channel is contiguous
    step = step.t().contiguous()
    codes = torch.empty(k, n, dtype=torch.uint8, device=weight.device)
    solve_strip = _graphed_strip(n, weight.device) if weight.is_cuda else _solve_strip
    for begin in range(0, k, _PANEL):
        end = min(begin + _PANEL, k)
        errors = torch.empty(end - begin, n, dtype=torch.float32, device=weight.device)
        for first in range(begin, end, _STRIP):
            strip = slice(first, first + _STRIP)
            codes[strip], strip_errors = solve_strip(columns[strip], step[group[strip]], factor[strip, strip])
            columns[first + _STRIP : end].addmm_(factor[strip, first + _STRIP : end].t(), strip_errors, alpha=-1)
            errors[first - begin : first - begin + _STRIP] = strip_errors
        columns[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def _solve_strip(weight: torch.Tensor, step: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codes ``[16, N]`` uint8 and errors ``[16, N]`` float32 of 16 channels in sequence.

    Args:
        weight: ``[16, N]`` float32. It is overwritten.
        step: ``[16, N]`` float32.
        factor: ``[16, 16]``, the channels' block of U.
    """
    codes = torch.empty_like(weight, dtype=torch.uint8)
    errors = torch.empty_like(weight)
    for i in range(len(weight)):
        quotient = weight[i] / step[i]
        code = e2m1_magnitude_codes(quotient.abs())
        codes[i] = code.to(torch.uint8) | (quotient < 0).to(torch.uint8) << 3
        rounded = torch.copysign(e2m1_magnitudes(code), quotient).mul_(step[i])
        errors[i] = (weight[i] - rounded) / factor[i, i]
        weight[i + 1 :] -= factor[i, i + 1 :].unsqueeze(1) * errors[i]
    return codes, errors


@functools.lru_cache(maxsize=8)  # a decoder layer has four kinds of inputs
def _graphed_strip(n: int, device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Returns :func:`_solve_strip` as a CUDA graph.

    Its roughly 250 small kernels take longer to launch than to run.
    """
    shapes = ((_STRIP, n), (_STRIP, n), (_STRIP, _STRIP))
    inputs = [torch.ones(shape, dtype=torch.float32, device=device) for shape in shapes]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        _solve_strip(*inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _solve_strip(*inputs)

    def replay(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for place, value in zip(inputs, values, strict=True):
            place.copy_(value)
        graph.replay()
        return outputs  # valid until the next call

    return replay
