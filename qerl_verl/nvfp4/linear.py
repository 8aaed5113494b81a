"""Holds the weight of a linear layer in NVFP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from qerl_verl.kernels.backends import Backend, Choice, choose_backend, get_backend
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE, dequantize_nvfp4
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear
from qerl_verl.kernels.packed_weight import PackedWeight


class NVFP4Linear(nn.Module):
    """Computes y = x W^T + b with a frozen W = e2m1 * block_scale / global_scale.

    Packed values and scales are one parameter, because FSDP2 handles parameters one by one on the
    host and each costs time. The bytes are those of the compressed-tensors format
    ``nvfp4-pack-quantized`` until :meth:`use_backend` or
    :func:`qerl_verl.nvfp4.loading.prepack_linears` puts them into the layout of a faster kernel.

    Attributes:
        weight_joined: ``[out_features * in_features * 9 / 16]`` bytes in ``storage_dtype``. The
            packed E2M1 codes, two a byte (``weight_packed`` of the format), come first, then the
            E4M3 scales (``weight_scale``). See :meth:`weight_bytes`.
        weight_global_scale: ``[1]`` float32, the divisor. It is a buffer, because FSDP2 does not
            cast buffers.
        bias: ``[out_features]`` or None, frozen.
        backend: the kernels that compute the layer; the bytes are in its layout.

    After :meth:`place` there is no ``weight_joined``. The bytes then belong to memory that other
    layers or processes share, and no code that moves, shards or saves parameters touches them.

    Args:
        in_features, out_features: K and N of the weight.
        bias: whether the layer has a bias.
        dtype: dtype of the bias.
        device: device of the empty tensors.
        storage_dtype: dtype under which the bytes are stored. They are only ever copied, never
            computed with. uint8 by default; for FSDP2 see :data:`qerl_verl.engine.nvfp4.CARRIER`.

    Raises:
        ValueError: ``in_features`` is not a multiple of 16, or the bytes do not fill whole
            ``storage_dtype`` items.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype,
        device=None,
        storage_dtype: torch.dtype = torch.uint8,
    ):
        super().__init__()
        size = out_features * in_features * 9 // 16
        if in_features % BLOCK_SIZE or size % storage_dtype.itemsize:
            raise ValueError(
                f"in_features={in_features} with out_features={out_features}: the NVFP4 blocks of "
                f"{BLOCK_SIZE} do not fill whole items of {storage_dtype}"
            )
        self.in_features, self.out_features = in_features, out_features

        def frozen(items: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(items, dtype=dtype, device=device), requires_grad=False)

        self.weight_joined = frozen(size // storage_dtype.itemsize, storage_dtype)
        self.register_buffer("weight_global_scale", torch.empty(1, dtype=torch.float32, device=device))
        self.bias = frozen(out_features, dtype) if bias else None
        self._global_scale: float | None = None
        self._placed: tuple[torch.Tensor, torch.Tensor] | None = None
        self.backend: Backend = get_backend("pytorch")

    @property
    def packed_weight(self) -> PackedWeight:
        """The weight in the backend's layout; the first call reads the global scale from the
        device."""
        if self._global_scale is None:
            self._global_scale = self.weight_global_scale.item()
        return PackedWeight(*self.weight_bytes(), self._global_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``[..., out_features]`` in autocast's dtype, or in the dtype of ``x``.

        Args:
            x: ``[..., in_features]`` floating point.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return nvfp4_linear(x, self.packed_weight, self.bias, self.backend)

    def use_backend(
        self,
        device: torch.device,
        wanted: str = "auto",
        dtype: torch.dtype = torch.bfloat16,
        *,
        name: str = "a layer",
        elsewhere: Mapping[str, str] | None = None,
    ) -> Choice:
        """Chooses the kernels for ``device``, and converts the bytes into their layout on it.

        A layer on the meta device only gets the kernels.

        Args:
            device: where the layer will compute. Its tensors stay where they are.
            wanted: see :func:`qerl_verl.kernels.backends.choose_backend`.
            dtype: dtype of the activations.
            name: the layer's name, for messages.
            elsewhere: see :func:`qerl_verl.kernels.backends.choose_backend`.

        Raises:
            ValueError: a requested kernel cannot run here or does not serve the layer.
        """
        shape = self.out_features, self.in_features
        choice = choose_backend(device, shape, dtype, wanted, layer=name, elsewhere=elsewhere)
        chosen = cast(Backend, choice.backend)
        if chosen is self.backend:
            return choice
        if not self.weight_bytes()[0].is_meta:
            packed, scale = self.backend.unpack(*(t.to(device) for t in self.weight_bytes()))
            packed, scale = chosen.prepack(packed, scale)
            for place, new in zip(self.weight_bytes(), (packed, scale), strict=True):
                place.copy_(new)
        self.backend = chosen
        return choice

    def place(self, packed: torch.Tensor, scale: torch.Tensor) -> None:
        """Keeps the weight in memory of the caller and drops the layer's own memory.

        The caller fills the memory, in the backend's layout.

        Args:
            packed: ``[out_features, in_features / 2]`` uint8, memory for the packed values.
            scale: ``[out_features, in_features / 16]`` uint8, memory for the scales.

        Raises:
            ValueError: a shape differs from the layer's.
        """
        shapes = tuple(t.shape for t in self.weight_bytes())
        if (packed.shape, scale.shape) != shapes:
            raise ValueError(f"a weight of {shapes} cannot be placed in {(packed.shape, scale.shape)}")
        del self.weight_joined
        self._placed = packed, scale
        # PEFT reads the layer's device from a weight of this name (tuners/lora/model.py)
        self.qweight = packed

    def weight_bytes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of packed values and scales, both uint8, in the backend's layout.

        Shapes: ``[out_features, in_features / 2]`` and ``[out_features, in_features / 16]``.
        """
        if self._placed is not None:
            return self._placed
        joined, n, k = self.weight_joined.detach().view(torch.uint8), self.out_features, self.in_features
        end = n * k // 2
        return joined[:end].view(n, k // 2), joined[end:].view(n, k // BLOCK_SIZE)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Returns the weight, ``[out_features, in_features]`` in ``dtype``."""
        return dequantize_nvfp4(*self.backend.unpack(*self.weight_bytes()), self.weight_global_scale, dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
