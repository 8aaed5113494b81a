"""Makes experts of a tiny mixture: a checkpoint's tensors, and what they compute in float64."""

from __future__ import annotations

import copy

import torch

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_experts import ExpertStack, expert_factors
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4

LINEARS = ("gate_proj", "up_proj", "down_proj")


class TinyExperts:
    """Random experts, each larger than the previous one.

    Args:
        count: number of experts.
        shared_scale: whether gate and up of an expert share a global scale.

    Attributes:
        tensors: ``{expert}.{linear}.weight_packed``, ``weight_scale`` and ``weight_global_scale``.
        exact: ``(expert, linear)`` -> decoded weight, float64.
    """

    def __init__(self, count: int, hidden: int, inner: int, shared_scale: bool = True):
        generator = torch.Generator().manual_seed(3)
        self.count, self.tensors, self.exact = count, {}, {}
        for expert in range(count):
            weights = {
                name: torch.randn(shape, generator=generator) * 0.2 * (expert + 1)
                for name, shape in zip(LINEARS, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True)
            }
            scales = {name: nvfp4_global_scale(weight.abs().max()) for name, weight in weights.items()}
            if shared_scale:
                scales["gate_proj"] = scales["up_proj"] = torch.minimum(scales["gate_proj"], scales["up_proj"])
            for name, weight in weights.items():
                packed, scale = quantize_nvfp4(weight, scales[name])
                self.tensors |= {
                    f"{expert}.{name}.weight_packed": packed,
                    f"{expert}.{name}.weight_scale": scale,
                    f"{expert}.{name}.weight_global_scale": scales[name],
                }
                self.exact[expert, name] = dequantize_nvfp4(packed, scale, scales[name].double(), torch.float64)

    def stacked(self, *linears: str) -> tuple[torch.Tensor, ...]:
        """Returns the tensors of all experts, with the rows of several linears concatenated.

        These are ``weight_packed`` and ``weight_scale`` ``[E, N, ...]``, and
        ``weight_global_scale`` ``[E, linears]``.
        """

        def join(part, along):
            return [
                torch.cat([self.tensors[f"{e}.{name}.{part}"] for name in linears], along) for e in range(self.count)
            ]

        return tuple(torch.stack(join(part, 0)) for part in ("weight_packed", "weight_scale", "weight_global_scale"))

    def weights(self) -> tuple[ExpertStack, ExpertStack]:
        """Returns the weights for the kernels, with factors in float64."""
        gate_up, down = self.stacked("gate_proj", "up_proj"), self.stacked("down_proj")
        factors = expert_factors(gate_up[2].double(), down[2][:, 0].double())
        return ExpertStack(*gate_up[:2], factors[0]), ExpertStack(*down[:2], factors[1])

    def adapted(self, tensors: dict[str, torch.Tensor], prefix: str, scaling: float) -> TinyExperts:
        """Returns a copy whose exact weights have the deltas of an adapter, which names the linears
        as a file does."""
        other = copy.copy(self)
        other.exact = {}
        for (expert, linear), weight in self.exact.items():
            a, b = (tensors[f"{prefix}.{expert}.{linear}.lora_{part}.weight"].double() for part in "AB")
            other.exact[expert, linear] = weight + scaling * b @ a
        return other

    def compute(self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Computes the experts token by token in float64; a negative expert adds nothing."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t, row in enumerate(x.double()):
            for weight, expert in zip(weights[t].double(), chosen[t].tolist(), strict=True):
                if expert >= 0:
                    gate, up, down = (self.exact[expert, name] for name in LINEARS)
                    h = gate @ row
                    out[t] += weight * (down @ (h * h.sigmoid() * (up @ row)))
        return out


def make_adapter(experts: TinyExperts, prefix: str, rank: int) -> dict[str, torch.Tensor]:
    """Returns an adapter on every linear of every expert, by the names of a file."""
    generator, tensors = torch.Generator().manual_seed(7), {}
    for (expert, linear), weight in experts.exact.items():
        (rows, columns), name = weight.shape, f"{prefix}.{expert}.{linear}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.3
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.3
    return tensors


def make_tokens(dtype: torch.dtype, tokens: int, hidden: int, experts: int):
    """Returns activations ``[tokens, hidden]`` and router logits ``[tokens, experts]``.

    No token chooses the last expert.
    """
    generator = torch.Generator().manual_seed(1)
    x, logits = (torch.randn(tokens, n, generator=generator) for n in (hidden, experts))
    logits[:, -1] = -9.0
    return x.to(dtype), logits
