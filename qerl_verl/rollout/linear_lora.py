"""Holds the adapter in a linear layer of vLLM's: its buffers, and the GEMMs and weight syncs with
them.

The tensors are buffers of the layer and not of a module of their own: when vLLM reads a base back
into an engine that slept at level 2, it copies the new values of a layer's buffers to the addresses
that CUDA graphs hold (vllm/model_executor/model_loader/reload/layerwise.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch

from qerl_verl.job import LoraSettings
from qerl_verl.kernels.backends import Backend
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference
from qerl_verl.kernels.packed_weight import PackedWeight

Shard = Callable[[torch.Tensor, int, int], torch.Tensor]
"""Takes a full tensor, a dimension and its size on this rank; returns this rank's part."""


class LinearAdapter:
    """What a layer knows of its adapter, beside the buffers ``qerl_lora_a`` and ``qerl_lora_b``.

    Attributes:
        ends: the row of the weight at which each fused projection ends.
        scaling: lora_alpha / rank of the engine's start, which captured CUDA graphs hold.
        backend: whose :meth:`~qerl_verl.kernels.backends.Backend.lora_linear` takes the buffers.
        whole: whether the buffer of B is in the backend's layout. Otherwise the rows of each
            projection are by themselves, for :meth:`part`.
    """

    def __init__(self, ends: tuple[int, ...], scaling: float, backend: Backend, whole: bool = True):
        self.ends, self.scaling, self.backend, self.whole = ends, scaling, backend, whole

    @staticmethod
    def rank(layer: torch.nn.Module) -> int:
        """Returns the largest rank that the buffers have room for."""
        return layer.qerl_lora_b.shape[1]

    def linear(
        self, layer: torch.nn.Module, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the layer's output with the adapter, by the backend's kernel."""
        return self.backend.lora_linear(x, weight, bias, layer.qerl_lora_a, layer.qerl_lora_b, self.ends, self.scaling)

    def part(
        self, layer: torch.nn.Module, index: int, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The output of one projection with its adapter, where the buffers are not ``whole``.

        Args:
            index: of the projection.
            weight, bias: those of the projection.
        """
        begin, end, rank = (0, *self.ends)[index], self.ends[index], self.rank(layer)
        a = layer.qerl_lora_a.narrow(0, index * rank, rank)
        b = layer.qerl_lora_b.narrow(0, begin, end - begin)
        return self.backend.lora_linear(x, weight, bias, a, b, (end - begin,), self.scaling)

    def _prepack_b(self, b: torch.Tensor) -> torch.Tensor:
        if self.whole:
            return self.backend.prepack_lora_b(b)
        rows = [end - begin for begin, end in itertools.pairwise((0, *self.ends))]
        return torch.cat([self.backend.prepack_lora_b(part) for part in b.split(rows)])

    def add(self, layer: torch.nn.Module, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Adds the LoRA delta to the layer's output ``y``, which it overwrites, by small GEMMs."""
        b = self.backend.unpack_lora_b(layer.qerl_lora_b)
        return add_lora_reference(y, x, layer.qerl_lora_a, b, self.ends, self.scaling)

    def check(
        self, layer: torch.nn.Module, name: str, parts: Mapping[tuple[int, str], torch.Tensor], shard: Shard
    ) -> None:
        """Checks that an adapter fits the buffers.

        Args:
            name: of the layer, for messages.
            parts: projection and ``"A"`` or ``"B"`` -> full tensor.
            shard: see :data:`Shard`.

        Raises:
            ValueError: an A without its B, a rank beyond the buffers', or a shape that does not
        fit."""
        room, ends = self.rank(layer), (0, *self.ends)
        for index, _ in parts:
            a, b = parts.get((index, "A")), parts.get((index, "B"))
            if a is None or b is None:
                raise ValueError(f"the adapter has one of A and B of {name}, projection {index}, but not the other")
            if a.shape[0] != b.shape[1] or a.shape[0] > room:
                raise ValueError(
                    f"the adapter's {name} has A {tuple(a.shape)} and B {tuple(b.shape)}; the "
                    f"rollout has room for rank {room}: set actor_rollout_ref.model.lora_rank to "
                    "the adapter's rank"
                )
            try:
                shard(a, 1, layer.qerl_lora_a.shape[1])
                shard(b, 0, ends[index + 1] - ends[index])
            except ValueError as error:
                raise ValueError(
                    f"the adapter's {name}, projection {index}, does not fit the rollout model: {error}"
                ) from error

    def write(
        self, layer: torch.nn.Module, parts: Mapping[tuple[int, str], torch.Tensor], scaling: float, shard: Shard
    ) -> None:
        """Overwrites the buffers; projections that the adapter does not have become zero.

        Args:
            parts: as for :meth:`check`.
            scaling: the adapter's own, which B takes up where it differs from the engine's.
            shard: see :data:`Shard`.
        """
        a_buffer, b_buffer = layer.qerl_lora_a, layer.qerl_lora_b
        room = self.rank(layer)
        a_new, b_new = torch.zeros_like(a_buffer), torch.zeros_like(b_buffer)
        begin = 0
        for index, end in enumerate(self.ends):
            if (index, "A") in parts:
                a = shard(parts[index, "A"].to(a_buffer.device), 1, a_buffer.shape[1])
                b = shard(parts[index, "B"].to(b_buffer.device), 0, end - begin)
                if scaling != self.scaling:
                    b = b.float() * (scaling / self.scaling)
                a_new[index * room : index * room + a.shape[0]] = a
                b_new[begin:end, : b.shape[1]] = b
            begin = end
        a_buffer.copy_(a_new)
        b_buffer.copy_(self._prepack_b(b_new))


def attach_adapter(
    layer: torch.nn.Module,
    settings: LoraSettings,
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    whole: bool = True,
) -> LinearAdapter:
    """Gives a layer the buffers ``qerl_lora_a`` ``[projections * rank, K]`` and ``qerl_lora_b``
    ``[N, rank]``, all zero, with the rank padded to the backend's multiple.

    Args:
        layer: with vLLM's ``logical_widths`` (the rows of each fused projection on this rank) and
            ``input_size_per_partition``.
        settings: rank and scaling of the adapter.
        backend: computes the layer.
        dtype, device: of the buffers.
        whole: see :class:`LinearAdapter`.

    Returns:
        The adapter, which is also the layer's attribute ``qerl_adapter``.
    """
    rank, ends = backend.padded_rank(settings.rank), tuple(itertools.accumulate(layer.logical_widths))
    a = torch.zeros(len(ends) * rank, layer.input_size_per_partition, dtype=dtype, device=device)
    b = torch.zeros(ends[-1], rank, dtype=dtype, device=device)
    layer.register_buffer("qerl_lora_a", a, persistent=False)
    layer.register_buffer("qerl_lora_b", b, persistent=False)
    layer.qerl_adapter = LinearAdapter(ends, settings.scaling, backend, whole)
    return layer.qerl_adapter


def adapter_of(layer: torch.nn.Module) -> LinearAdapter | None:
    """Returns the adapter that :func:`attach_adapter` gave a layer, or None."""
    return getattr(layer, "qerl_adapter", None)
