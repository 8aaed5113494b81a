"""Computes the experts of a mixture, ``y_t = sum_e w_te down_e(silu(gate_e x_t) * up_e x_t)``, with
NVFP4 weights, in plain PyTorch.

This module is the rollout's side: the forward pass of a whole mixture, as vLLM calls it, in the
checkpoint's layout. The actor trains with :mod:`qerl_verl.kernels.nvfp4_grouped_linear`, one
differentiable linear at a time. The two differ in where the values of an expert are rounded:

- Here a GEMM applies its factor to the accumulator, so an output is rounded once. The actor's
  grouped GEMM takes no factor for each expert, so its output is rounded, multiplied by the factor
  and the routing weight in float32, and rounded again.
- Here the weighted outputs of a token are rounded after they are added, and in the actor before.
- The actor multiplies gate and up by a factor each. Here both have gate's, as described below.

``tests/nvfp4/test_experts.py`` holds the two together within these roundings.

Plain PyTorch is the reference of any faster kernel and runs where there is none. The weight of one
expert at a time is decoded, for the two GEMMs of that expert's tokens.

A checkpoint has a global scale for each of gate, up and down. A grouped kernel takes one factor for
the rows of gate and up together, as vLLM's do, so :func:`expert_factors` moves what up's scale
differs by from gate's into down's factor: up enters the result linearly, so this changes nothing
but the place where it is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_linear import scaled_mm


@dataclass(frozen=True)
class ExpertStack:
    """One matrix of each expert.

    Attributes:
        packed: ``[E, N, K / 2]`` uint8, two E2M1 codes a byte, low nibble first.
        scale: ``[E, N, K / 16]`` float8_e4m3fn, or the same bytes as uint8.
        factors: ``[E]`` float32, by which the accumulator of each expert's GEMM is multiplied.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    factors: torch.Tensor

    def block_values(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """Returns ``e2m1 * scale`` of one expert, ``[N, K]`` in ``dtype``."""
        return block_values_nvfp4(self.packed[expert], self.scale[expert], dtype)


@dataclass(frozen=True)
class ExpertAdapter:
    """A LoRA adapter on each linear of each expert.

    Attributes:
        gate_up_a, gate_up_b: ``[E, 2 R, H]``, gate's rank before up's, and ``[E, 2 I, R]``.
        down_a, down_b: ``[E, R, I]`` and ``[E, H, R]``.
        scaling: lora_alpha / rank.
    """

    gate_up_a: torch.Tensor
    gate_up_b: torch.Tensor
    down_a: torch.Tensor
    down_b: torch.Tensor
    scaling: float

    @classmethod
    def zeros(cls, count: int, hidden: int, inner: int, rank: int, scaling: float, dtype, device) -> ExpertAdapter:
        """Returns an adapter of zeros for ``count`` experts."""
        shapes = (2 * rank, hidden), (2 * inner, rank), (rank, inner), (hidden, rank)
        gate_up_a, gate_up_b, down_a, down_b = (
            torch.zeros(count, *shape, dtype=dtype, device=device) for shape in shapes
        )
        return cls(gate_up_a, gate_up_b, down_a, down_b, scaling)


def expert_factors(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the factors of :class:`ExpertStack` from a checkpoint's global scales.

    Args:
        gate_up: ``[E, 2]`` float32, ``weight_global_scale`` of gate and up.
        down: ``[E]`` float32.

    Returns:
        ``factors`` of gate and up, and of down, ``[E]`` each. The second is a pure reciprocal where
        gate and up share a scale.
    """
    gate, up = gate_up.unbind(1)
    return 1 / gate, gate / up / down


def route_softmax(logits: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the experts of each token: softmax in float32, the ``top_k`` largest.

    As transformers' Qwen3MoeTopKRouter and vLLM's ``topk_softmax`` kernel.

    Args:
        logits: ``[T, E]``.
        renormalize: whether the weights of a token add up to 1 (``norm_topk_prob``).

    Returns:
        Weights ``[T, top_k]`` float32, the largest first, and expert numbers ``[T, top_k]`` int64.
    """
    weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), chosen


def nvfp4_experts_reference(
    x: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    gate_up: ExpertStack,
    down: ExpertStack,
    adapter: ExpertAdapter | None = None,
) -> torch.Tensor:
    """Returns the weighted sum of the chosen experts' outputs of each token.

    Args:
        x: ``[T, H]`` bfloat16, float16, float32 or float64.
        weights: ``[T, k]`` of the chosen experts' outputs.
        chosen: ``[T, k]`` integers below E, no expert twice for a token. A negative one is an
            expert of another rank and adds nothing.
        gate_up: N is 2 I, gate's rows before up's, and K is H.
        down: N is H, and K is I.
        adapter: in ``x.dtype``, or None.

    Returns:
        ``[T, H]`` in ``x.dtype``; summed over the experts in float32 (float64 for float64). Reads
        on the host which experts have tokens, so no CUDA graph can hold it.
    """
    out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    factors = gate_up.factors.tolist(), down.factors.tolist()
    for expert in chosen.unique().tolist():
        if expert < 0:
            continue
        tokens, places = torch.where(chosen == expert)
        both = scaled_mm(x[tokens], gate_up.block_values(expert, x.dtype).t(), factors[0][expert], None)
        gate, up = both.chunk(2, dim=-1)
        if adapter is not None:
            a, b = adapter.gate_up_a[expert], adapter.gate_up_b[expert]
            for part, u, b_ in zip((gate, up), (x[tokens] @ a.t()).chunk(2, -1), b.chunk(2), strict=True):
                part.addmm_(u, b_.t(), alpha=adapter.scaling)
        inner = F.silu(gate) * up
        y = scaled_mm(inner, down.block_values(expert, x.dtype).t(), factors[1][expert], None)
        if adapter is not None:
            y = y.addmm_(inner @ adapter.down_a[expert].t(), adapter.down_b[expert].t(), alpha=adapter.scaling)
        out.index_add_(0, tokens, y.to(out.dtype) * weights[tokens, places, None].to(out.dtype))
    return out.to(x.dtype)
