"""A linear layer that holds its weight in NVFP4."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from qerl_verl.kernels.backends import Backend, Choice, choose_backend, get_backend
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE, dequantize_nvfp4
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear


class NVFP4Linear(nn.Module):
    """y = x W^T + b with W = e2m1 * block_scale / global_scale, frozen.

    Packed values and scales are one parameter: FSDP2 works on parameters one by one, on the host,
    and each costs it time. Their bytes are those of the compressed-tensors format
    ``nvfp4-pack-quantized``, until :meth:`use_backend` or
    :func:`qerl_verl.nvfp4.loading.prepack_linears` puts them into the layout of a faster kernel.

    Attributes:
        weight_joined: ``[out_features * in_features * 9 / 16]`` bytes in ``storage_dtype``: two
            E2M1 codes each (``weight_packed`` of the format), and behind them the E4M3 scales
            (``weight_scale``). See :meth:`weight_bytes`.
        weight_global_scale: ``[1]`` float32 buffer, the divisor; a buffer, since FSDP2 casts no
            buffers.
        bias: ``[out_features]`` or None, frozen.
        backend: whose kernels compute the layer, and in whose layout the bytes are.

    After :meth:`place` there is no ``weight_joined``: the bytes belong to memory that other layers
    or processes use too, and nothing that moves, shards or saves parameters touches them.

    Args:
        storage_dtype: what the bytes are declared as; only ever copied, never computed with. uint8
            by itself; under FSDP2 see :data:`qerl_verl.engine.fsdp.CARRIER`.

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
                f"in_features={in_features} with out_features={out_features}: the NVFP4 blocks of {BLOCK_SIZE} do not fill whole "
                f"items of {storage_dtype}"
            )
        self.in_features, self.out_features = in_features, out_features

        def frozen(items: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(items, dtype=dtype, device=device), requires_grad=False)

        self.weight_joined = frozen(size // storage_dtype.itemsize, storage_dtype)
        self.register_buffer("weight_global_scale", torch.empty(1, dtype=torch.float32, device=device))
        self.bias = frozen(out_features, dtype) if bias else None
        self._alpha: float | None = None
        self._placed: tuple[torch.Tensor, torch.Tensor] | None = None
        self.backend: Backend = get_backend("pytorch")

    @property
    def alpha(self) -> float:
        """1 / ``weight_global_scale`` on the host, read from the device once."""
        if self._alpha is None:
            self._alpha = 1.0 / self.weight_global_scale.item()
        return self._alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: ``[..., in_features]`` floating point. Returns: ``[..., out_features]`` in
        autocast's dtype, or x's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return nvfp4_linear(x, *self.weight_bytes(), self.alpha, self.bias, self.backend)

    def use_backend(
        self,
        device: torch.device,
        wanted: str = "auto",
        dtype: torch.dtype = torch.bfloat16,
        *,
        name: str = "a layer",
        elsewhere: Mapping[str, str] | None = None,
    ) -> Choice:
        """Chooses the kernels for ``device``; where the layer has data, puts its bytes into their
        layout, on that device.

        Args:
            device: where the layer will compute; its tensors stay where they are.
            wanted: see :func:`qerl_verl.kernels.backends.choose_backend`.
            dtype: of the activations.
            name: of the layer, for messages.
            elsewhere: see :func:`qerl_verl.kernels.backends.choose_backend`.

        Raises:
            ValueError: a wanted kernel that cannot run here or does not serve the layer.
        """
        shape = self.out_features, self.in_features
        choice = choose_backend(device, shape, dtype, wanted, layer=name, elsewhere=elsewhere)
        chosen = choice.backend
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
        """Keeps the weight in memory of the caller's from now on; what the layer held is dropped.

        Args:
            packed: ``[out_features, in_features / 2]`` uint8, where the packed values go.
            scale: ``[out_features, in_features / 16]`` uint8, where the scales go.
        """
        shapes = tuple(t.shape for t in self.weight_bytes())
        if (packed.shape, scale.shape) != shapes:
            raise ValueError(f"a weight of {shapes} cannot be placed in {(packed.shape, scale.shape)}")
        del self.weight_joined
        self._placed = packed, scale
        self.qweight = (
            packed  # PEFT asks for the device of a weight of this name, of a parameter or not (tuners/lora/model.py)
        )

    def weight_bytes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of the packed values ``[out_features, in_features / 2]`` and of the scales
        ``[out_features, in_features / 16]``, both uint8, in the backend's layout."""
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
