"""A linear layer that holds its weight in NVFP4."""

from __future__ import annotations

import torch
from torch import nn

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE, dequantize_nvfp4
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear


class NVFP4Linear(nn.Module):
    """y = x W^T + b with W = e2m1 * block_scale / global_scale, frozen.

    Tensor names and bytes are those of the compressed-tensors format ``nvfp4-pack-quantized``.

    Attributes:
        weight_packed: ``[out_features, in_features / 2]`` uint8.
        weight_scale: ``[out_features, in_features / 16]`` uint8, the bytes of the E4M3 scales. Bytes, since FSDP2's
            mixed precision would cast a floating-point parameter to bfloat16 for its all-gather, and integers pass as they are
            (torch/distributed/fsdp/_fully_shard/_fsdp_param.py, init_dtype_attrs).
        weight_global_scale: ``[1]`` float32 buffer, the divisor; a buffer, since FSDP2 casts no buffers.
        bias: ``[out_features]`` or None, frozen.

    Raises:
        ValueError: ``in_features`` is not a multiple of 16.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device=None):
        super().__init__()
        if in_features % BLOCK_SIZE:
            raise ValueError(f"in_features={in_features} is not a multiple of {BLOCK_SIZE}, the NVFP4 block")
        self.in_features, self.out_features = in_features, out_features

        def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        self.weight_packed = frozen(out_features, in_features // 2, dtype=torch.uint8)
        self.weight_scale = frozen(out_features, in_features // BLOCK_SIZE, dtype=torch.uint8)
        self.register_buffer("weight_global_scale", torch.empty(1, dtype=torch.float32, device=device))
        self.bias = frozen(out_features, dtype=dtype) if bias else None
        self._alpha: float | None = None

    @property
    def alpha(self) -> float:
        """1 / ``weight_global_scale`` on the host, read from the device once."""
        if self._alpha is None:
            self._alpha = 1.0 / self.weight_global_scale.item()
        return self._alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: ``[..., in_features]`` floating point. Returns: ``[..., out_features]`` in autocast's dtype, or x's."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return nvfp4_linear(x, self.weight_packed, self.weight_scale, self.alpha, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The weight, ``[out_features, in_features]`` in ``dtype``."""
        return dequantize_nvfp4(self.weight_packed, self.weight_scale, self.weight_global_scale, dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
