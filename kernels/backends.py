"""Which kernels compute an NVFP4 linear layer: one choice, made once for a process, serving actor and rollout alike.

A backend owns the layout of the weight: ``prepack`` turns the checkpoint's bytes into it, once and at the same size, and
everything else takes what ``prepack`` gave. So a layer of the actor and one of the rollout engine could share a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qerl_verl.kernels import hopper, portable
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear_reference
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference

NAMES = ("hopper", "triton", "pytorch")


class Backend:
    """Plain PyTorch, on any device: the reference of the other backends and their base class.

    All weights are pairs ``(packed, scale)`` of uint8, ``[N, K / 2]`` and ``[N, K / 16]``, in this backend's layout;
    ``alpha`` is 1 / ``weight_global_scale`` and applied to the accumulator. No method is differentiable.
    """

    name = "pytorch"
    description = "PyTorch (dequantize, matrix product)"
    lora_rank_multiple = 1

    def refuses(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        """Why an ``[n, k]`` weight with ``dtype`` activations is not served, or None if it is."""
        return None

    def prepack(self, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the checkpoint's layout to this backend's; new tensors or the same ones."""
        return packed, scale

    def unpack(self, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of :meth:`prepack`."""
        return packed, scale

    def prepack_lora_b(self, b: torch.Tensor) -> torch.Tensor:
        """A LoRA B ``[N, rank]`` in the layout of :meth:`lora_linear`, of the same shape."""
        return b

    def unpack_lora_b(self, b: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`prepack_lora_b`."""
        return b

    def block_values(self, packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``e2m1 * scale``, ``[N, K]`` in ``dtype``."""
        return block_values_nvfp4(packed, scale, dtype)

    def linear(self, x, packed, scale, alpha: float, bias=None) -> torch.Tensor:
        """``alpha x (e2m1 * scale)^T + bias``: ``[..., K]`` to ``[..., N]``."""
        return nvfp4_linear_reference(x, packed, scale, alpha, bias)

    def add_linear(self, y, x, packed, scale, alpha: float) -> torch.Tensor:
        """``y += alpha x (e2m1 * scale)^T`` in place, ``[M, N]`` and ``[M, K]``, with a temporary weight in ``x.dtype``."""
        return y.addmm_(x, self.block_values(packed, scale, x.dtype).t(), alpha=alpha)

    def dequantizes(self, tokens: int, n: int, k: int) -> bool:
        """Whether :meth:`linear` makes a 16-bit ``[n, k]`` weight for that many tokens and calls PyTorch's GEMM."""
        return True

    def tune(
        self, device: torch.device, n: int, k: int, ends: Sequence[int] | None = None, rank: int = 32
    ) -> str | None:
        """Choose launch configurations for an ``[n, k]`` weight on ``device``, by measuring them or from the cache.

        Args:
            ends: for :meth:`lora_linear`, the row at which each fused projection ends; None for :meth:`linear`.
            rank: of the adapter.

        Returns:
            A sentence for the log where something was measured or could not be, else None.
        """
        return None

    def lora_linear(
        self, x, packed, scale, alpha: float, bias, lora_a, lora_b, ends: Sequence[int], scaling: float
    ) -> torch.Tensor:
        """:meth:`linear` and the term of one adapter, see :func:`add_lora_reference`; ``lora_b`` is prepacked."""
        return add_lora_reference(self.linear(x, packed, scale, alpha, bias), x, lora_a, lora_b, ends, scaling)


class HopperBackend(Backend):
    """CUDA C++ for compute capability 9.0, see ``kernels/hopper``."""

    name = "hopper"
    description = "Hopper W4A16 (WGMMA, CUDA C++)"
    lora_rank_multiple = hopper.LORA_UNIT

    def refuses(self, n, k, dtype):
        return hopper.check(n, k, dtype)

    def prepack(self, packed, scale):
        return hopper.prepack(packed, scale)

    def unpack(self, packed, scale):
        return hopper.unpack(packed, scale)

    def prepack_lora_b(self, b):
        return hopper.prepack_lora_b(b)

    def unpack_lora_b(self, b):
        return hopper.unpack_lora_b(b)

    def block_values(self, packed, scale, dtype):
        return hopper.dequantize(packed, scale).to(dtype)

    def linear(self, x, packed, scale, alpha, bias=None):
        return hopper.gemm(x, packed, scale, alpha, bias)

    def dequantizes(self, tokens, n, k):
        return hopper.dequantizes(tokens, n, k)

    def tune(self, device, n, k, ends=None, rank=32):
        if device.type != "cuda":
            return None
        if ends is not None and hopper.check_lora(n, k, rank, ends):
            ends = None  # lora_linear then adds the LoRA delta to the output of the plain GEMM
        return hopper.tune(device, n, k, ends, rank)

    def lora_linear(self, x, packed, scale, alpha, bias, lora_a, lora_b, ends, scaling):
        n, k = packed.shape[0], packed.shape[1] * 2
        if hopper.check_lora(n, k, lora_b.shape[1], ends) is None:
            return hopper.lora_gemm(x, packed, scale, alpha, bias, lora_a, lora_b, ends, scaling)
        y = hopper.gemm(x, packed, scale, alpha, bias)
        return add_lora_reference(y, x, lora_a, hopper.unpack_lora_b(lora_b), ends, scaling)


class PortableBackend(Backend):
    """Triton, for every NVIDIA GPU, in the checkpoint's own layout, see ``kernels/portable``."""

    name = "triton"
    description = "Triton W4A16"

    def refuses(self, n, k, dtype):
        if dtype not in (torch.bfloat16, torch.float16):
            return f"activations have to be bfloat16 or float16, got {dtype}"
        return None if k % 64 == 0 else f"K has to be a multiple of 64, got {k}"

    def block_values(self, packed, scale, dtype):
        if dtype not in (torch.bfloat16, torch.float16):
            return super().block_values(packed, scale, dtype)
        return portable.dequantize(packed, scale, dtype)

    def linear(self, x, packed, scale, alpha, bias=None):
        return portable.gemm(x, packed, scale, alpha, bias)

    def dequantizes(self, tokens, n, k):
        return tokens > portable.tuning.DEQUANTIZE_ABOVE

    def lora_linear(self, x, packed, scale, alpha, bias, lora_a, lora_b, ends, scaling):
        if len(ends) > 1 or lora_b.shape[1] % 16:
            return super().lora_linear(x, packed, scale, alpha, bias, lora_a, lora_b, ends, scaling)
        u = x @ lora_a.t()
        return portable.gemm(x, packed, scale, alpha, bias, u if scaling == 1 else u * scaling, lora_b)


_BACKENDS = {b.name: b for b in (Backend(), HopperBackend(), PortableBackend())}


def unavailable(name: str, device: torch.device) -> str | None:
    """Why backend ``name`` cannot run on ``device`` at all, or None if it can."""
    if name == "pytorch":
        return None
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    return hopper.availability(device.index) if name == "hopper" else portable.availability()


def choose_backend(device: torch.device, wanted: str = "auto", setting: str = "qerl.kernel") -> tuple[Backend, str]:
    """The backend for a device, and a sentence that says which and why.

    Args:
        wanted: ``auto`` takes the first of hopper, triton, pytorch that the device has; a name insists on it.
        setting: where ``wanted`` comes from.

    Raises:
        ValueError: an unknown name, or a backend that cannot run here, with the reason.
    """
    if wanted == "auto":
        reasons = []
        for name in NAMES:
            reason = unavailable(name, device)
            if reason is None:
                why = f" ({'; '.join(reasons)})" if reasons else ""
                return _BACKENDS[name], f"{_BACKENDS[name].description} on {_name_of(device)}{why}"
            reasons.append(f"not {name}: {reason}")
    if wanted not in _BACKENDS:
        raise ValueError(f"{setting}={wanted}: choose one of auto, {', '.join(NAMES)}")
    if reason := unavailable(wanted, device):
        raise ValueError(
            f"{setting}={wanted} cannot run on {_name_of(device)}: {reason}; use auto or another of {NAMES}"
        )
    return _BACKENDS[wanted], f"{_BACKENDS[wanted].description} on {_name_of(device)} ({setting})"


def backend_for(device: torch.device, n: int, k: int, dtype: torch.dtype, wanted: str = "auto") -> Backend:
    """:func:`choose_backend`, or plain PyTorch for a shape or dtype that the chosen one does not serve."""
    chosen, _ = choose_backend(device, wanted)
    return chosen if chosen.refuses(n, k, dtype) is None else _BACKENDS["pytorch"]


def get_backend(name: str) -> Backend:
    """A backend by name, whether or not it can run here."""
    return _BACKENDS[name]


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
