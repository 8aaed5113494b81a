"""Holds the experts of a layer in NVFP4, in place of transformers' 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn

from qerl_verl.kernels.backends import Backend, Choice, choose_backend, get_backend
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE, dequantize_nvfp4
from qerl_verl.kernels.nvfp4_grouped_linear import (
    Combine,
    Dispatch,
    ExpertWeights,
    Groups,
    nvfp4_grouped_linear,
)
from qerl_verl.kernels.nvfp4_lora_grouped_linear import nvfp4_lora_grouped_linear
from qerl_verl.nvfp4.architectures import EXPERT_LINEARS, EXPERT_STACKS

PROJECTIONS, STACKS = EXPERT_LINEARS, EXPERT_STACKS


def gated(act_fn: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Returns ``act_fn(gate) * up``."""
    return act_fn(gate) * up


class NVFP4Experts(nn.Module):
    """Computes sum_e p_e W_down,e (act(W_gate,e x) * W_up,e x) with the frozen experts of a layer.

    transformers calls this module in the place of its own experts (integrations/moe.py). Packed
    values and scales of all experts are one parameter, as in
    :class:`~qerl_verl.nvfp4.linear.NVFP4Linear`, in the backend's layout.

    Attributes:
        weight_joined: ``[27 / 16 * E * I * H]`` bytes in ``storage_dtype``: packed values and
            scales of gate and up, then those of down. See :meth:`weight_bytes`.
        weight_global_scale: ``[E, 3]`` float32 buffer, the divisors of gate, up and down.
        backends: stack -> the kernels that decode it, see :data:`STACKS`.

    Args:
        count, hidden, inner: E, H and I.
        act_fn: the activation function.
        device: device of the empty tensors.
        storage_dtype: see :class:`~qerl_verl.nvfp4.linear.NVFP4Linear`.

    Raises:
        ValueError: H or I is not a multiple of 16, or the bytes do not fill whole ``storage_dtype``
            items.
    """

    def __init__(
        self,
        count: int,
        hidden: int,
        inner: int,
        act_fn: nn.Module,
        device=None,
        storage_dtype: torch.dtype = torch.uint8,
    ):
        super().__init__()
        size = count * hidden * inner * 27 // 16
        if hidden % BLOCK_SIZE or inner % BLOCK_SIZE or size % storage_dtype.itemsize:
            raise ValueError(
                f"{count} experts of {inner} x {hidden}: the NVFP4 blocks of {BLOCK_SIZE} do not "
                f"fill whole items of {storage_dtype}"
            )
        self.num_experts, self.hidden_dim, self.intermediate_dim = count, hidden, inner
        self.act_fn, self.gated = act_fn, gated
        joined = torch.empty(size // storage_dtype.itemsize, dtype=storage_dtype, device=device)
        self.weight_joined = nn.Parameter(joined, requires_grad=False)
        self.register_buffer("weight_global_scale", torch.empty(count, 3, dtype=torch.float32, device=device))
        self.backends: dict[str, Backend] = dict.fromkeys(STACKS, get_backend("pytorch"))

    def shape_of(self, stack: str) -> tuple[int, int]:
        """Returns the shape of a stack as one matrix, expert below expert: ``(E * N, K)``."""
        if stack == "gate_up_proj":
            return self.num_experts * 2 * self.intermediate_dim, self.hidden_dim
        return self.num_experts * self.hidden_dim, self.intermediate_dim

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Returns name of each expert's linear, relative to this module -> (output, input
        features).
        """
        hidden, inner = self.hidden_dim, self.intermediate_dim
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        return {f"{e}.{linear}": shapes[linear] for e in range(self.num_experts) for linear in PROJECTIONS}

    def weight_bytes(self, stack: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of packed values ``[E * N, K / 2]`` and scales ``[E * N, K / 16]`` of a
        stack, uint8."""
        joined, begin = self.weight_joined.detach().view(torch.uint8), 0
        if stack == "down_proj":
            rows, columns = self.shape_of("gate_up_proj")
            begin = rows * columns * 9 // 16
        rows, columns = self.shape_of(stack)
        middle = begin + rows * columns // 2
        end = middle + rows * columns // BLOCK_SIZE
        return joined[begin:middle].view(rows, columns // 2), joined[middle:end].view(rows, columns // BLOCK_SIZE)

    def parts(self) -> dict[str, torch.Tensor]:
        """Returns tensor name of a checkpoint, relative to this module -> view of its memory."""
        parts = {}
        for stack, projections in STACKS.items():
            packed, scale = (t.chunk(self.num_experts) for t in self.weight_bytes(stack))
            for expert in range(self.num_experts):
                pieces = (t[expert].chunk(len(projections)) for t in (packed, scale))
                for projection, values, scales in zip(projections, *pieces, strict=True):
                    index = PROJECTIONS.index(projection)
                    name = f"{expert}.{projection}"
                    parts[f"{name}.weight_packed"], parts[f"{name}.weight_scale"] = values, scales
                    parts[f"{name}.weight_global_scale"] = self.weight_global_scale[expert, index : index + 1]
        return parts

    def use_backend(
        self,
        device: torch.device,
        wanted: str = "auto",
        dtype: torch.dtype = torch.bfloat16,
        *,
        name: str = "experts",
        elsewhere: Mapping[str, str] | None = None,
    ) -> dict[str, Choice]:
        """Chooses the kernels that decode the weights, and converts the bytes into their layout.

        See :meth:`NVFP4Linear.use_backend <qerl_verl.nvfp4.linear.NVFP4Linear.use_backend>`.

        Returns:
            Stack -> what was chosen.

        Raises:
            ValueError: a requested kernel cannot run here or does not serve the experts.
        """
        choices = {}
        for stack in STACKS:
            shape, part = self.shape_of(stack), f"{name}.{stack}"
            choice = choose_backend(device, shape, dtype, wanted, layer=part, elsewhere=elsewhere)
            choices[stack] = choice
            before, chosen = self.backends[stack], cast(Backend, choice.backend)
            if chosen is not before and not self.weight_joined.is_meta:
                packed, scale = before.unpack(*(t.to(device) for t in self.weight_bytes(stack)))
                for place, new in zip(self.weight_bytes(stack), chosen.prepack(packed, scale), strict=True):
                    place.copy_(new)
            self.backends[stack] = chosen
        return choices

    def _weights(self, stack: str) -> ExpertWeights:
        columns = [PROJECTIONS.index(projection) for projection in STACKS[stack]]
        divisors = self.weight_global_scale[:, columns[0] : columns[-1] + 1]
        inverse_scales = 1.0 / divisors.to(self.weight_joined.device).double()
        return ExpertWeights(*self.weight_bytes(stack), inverse_scales, self.backends[stack])

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Returns the weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: ``[T, H]`` floating point.
            top_k_index: ``[T, k]`` int64, the experts of each token.
            top_k_weights: ``[T, k]`` floating point.

        Returns:
            ``[T, H]`` in autocast's dtype, or ``hidden_states``'s.
        """
        return self.compute(hidden_states, top_k_index, top_k_weights)

    def compute(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        adapter: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        scaling: float = 1.0,
    ) -> torch.Tensor:
        """Computes :meth:`forward` with an adapter on the experts.

        Args:
            adapter: stack -> A ``[E, P r, K]`` and B ``[E, N, r]``, with the stack's P projections
                concatenated.
            scaling: lora_alpha / r.
        """
        x = hidden_states
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        k = top_k_index.shape[1]
        experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        groups = Groups.of(experts, self.num_experts)

        def linear(stack: str, rows: torch.Tensor, row_weights: torch.Tensor | None = None) -> torch.Tensor:
            weights = self._weights(stack)
            if adapter is None:
                return nvfp4_grouped_linear(rows, weights, groups, row_weights)
            return nvfp4_lora_grouped_linear(rows, weights, groups, *adapter[stack], scaling, row_weights)

        gate, up = linear("gate_up_proj", Dispatch.apply(x, order, inverse, k)).chunk(2, -1)
        rows = linear("down_proj", self.gated(self.act_fn, gate, up), top_k_weights.reshape(-1)[order])
        return Combine.apply(rows, order, inverse, k)

    def dequantize(self, stack: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Returns transformers' parameter in ``dtype``.

        It is ``gate_up_proj`` ``[E, 2 I, H]`` or ``down_proj`` ``[E, H, I]``.
        """
        packed, scale = self.backends[stack].unpack(*self.weight_bytes(stack))
        rows, columns = self.shape_of(stack)
        weights = []
        for expert, pair in enumerate(zip(packed.chunk(self.num_experts), scale.chunk(self.num_experts), strict=True)):
            pieces = (t.chunk(len(STACKS[stack])) for t in pair)
            for projection, values, scales in zip(STACKS[stack], *pieces, strict=True):
                divisor = self.weight_global_scale[expert, PROJECTIONS.index(projection)]
                weights.append(dequantize_nvfp4(values, scales, divisor, dtype))
        return torch.cat(weights).view(self.num_experts, rows // self.num_experts, columns)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, hidden={self.hidden_dim}, inner={self.intermediate_dim}"


def is_experts(module: nn.Module) -> bool:
    """Returns whether a module holds a layer's experts: NVFP4, or transformers' 3-D parameters."""
    stacks = [module._parameters.get(stack) for stack in STACKS]
    return isinstance(module, NVFP4Experts) or all(p is not None and p.ndim == 3 for p in stacks)
