"""Chooses the kernels of an NVFP4 linear layer, once for each layer of actor and rollout.

:func:`choose_backend` decides when a layer is built, and :class:`KernelCount` counts the decisions.
A backend owns the layout of the weight: ``prepack`` makes it of the checkpoint's bytes, once and at
the same size, and all other methods take what ``prepack`` gave. A layer of the actor and one of the
rollout engine can therefore share a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from qerl_verl.kernels import hopper
from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear_reference
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference
from qerl_verl.kernels.packed_weight import PackedWeight


class Candidate:
    """Something that can compute an NVFP4 linear layer, as :func:`choose_backend` sees it.

    The methods ``unsupported_...`` ask whether it serves a device, a weight or an adapter. Each
    gives a reason against it in one line, or None.
    """

    name: str
    """As in the settings ``qerl.kernel`` and ``qerl.rollout.kernel``."""

    description: str

    lora_rank_multiple = 1

    takes_adapter = False
    """Whether its kernel is meant to compute the adapter along with the base. A setting that names
    this candidate then insists on that."""

    def padded_rank(self, rank: int) -> int:
        """Returns the rank of an adapter's buffers: the next multiple of ``lora_rank_multiple``."""
        return -(-rank // self.lora_rank_multiple) * self.lora_rank_multiple

    def unsupported_device(self, device: torch.device) -> str | None:
        """Returns why the candidate does not run on ``device``, or None. Compiles the kernels if
        necessary.
        """
        return None

    def unsupported_weight(self, n: int, k: int, dtype: torch.dtype) -> str | None:
        """Returns why an ``[n, k]`` weight with ``dtype`` activations is not supported, or None."""
        return None

    def unsupported_adapter(self, n: int, k: int, rank: int, ends: Sequence[int]) -> str | None:
        """Returns why PyTorch adds the adapter of an ``[n, k]`` weight to the kernel's output, or
        None if the kernel computes it.

        Args:
            rank: rank of each projection's adapter.
            ends: the row at which each fused projection ends.
        """
        return None

    def path(self, n: int, k: int) -> str | None:
        """Returns the measured choice for an ``[n, k]`` weight, for the line ``[qerl] kernel:``."""
        return None


class Backend(Candidate):
    """Plain PyTorch on any device: the reference and the base class of the other backends.

    ``packed`` and ``scale`` are uint8, ``[N, K / 2]`` and ``[N, K / 16]``, in this backend's
    layout, also those of a :class:`~qerl_verl.kernels.packed_weight.PackedWeight`. No method is
    differentiable.
    """

    name = "pytorch"
    description = "PyTorch (decode, GEMM)"

    fused_row_multiple = 1
    """:meth:`prepack` of several projections stacked by rows is the stack of their prepacked bytes
    if the rows of all but the last are a multiple of this."""

    def prepack(self, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the weight in this backend's layout, from the checkpoint's layout; new tensors or
        the same ones.
        """
        return packed, scale

    def unpack(self, packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the inverse of :meth:`prepack`."""
        return packed, scale

    def prepack_lora_b(self, b: torch.Tensor) -> torch.Tensor:
        """Returns a LoRA B ``[N, rank]`` in the layout of :meth:`lora_linear`, of the same
        shape."""
        return b

    def unpack_lora_b(self, b: torch.Tensor) -> torch.Tensor:
        """Returns the inverse of :meth:`prepack_lora_b`."""
        return b

    def block_values(self, packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Returns ``e2m1 * scale``, ``[N, K]`` in ``dtype``: the weight without its global
        scale."""
        return block_values_nvfp4(packed, scale, dtype)

    def linear(self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Returns ``x (e2m1 * scale)^T / global_scale + bias``: ``[..., K]`` to ``[..., N]``."""
        return nvfp4_linear_reference(x, weight, bias)

    def add_linear(self, y: torch.Tensor, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """Returns ``y += x (e2m1 * scale)^T / global_scale`` in place, with a temporary weight in
        ``x.dtype``; ``y`` is ``[M, N]`` and ``x`` is ``[M, K]``."""
        values = self.block_values(weight.packed, weight.scale, x.dtype)
        return y.addmm_(x, values.t(), alpha=1.0 / weight.global_scale)

    def decodes_first(self, tokens: int, n: int, k: int) -> bool:
        """Returns whether :meth:`linear` makes a 16-bit ``[n, k]`` weight for that many tokens and
        calls PyTorch's GEMM."""
        return True

    def tune(
        self, device: torch.device, n: int, k: int, ends: Sequence[int] | None = None, rank: int = 32
    ) -> str | None:
        """Chooses launch configurations for an ``[n, k]`` weight on ``device``, by measuring them
        or from the cache.

        Args:
            ends: for :meth:`lora_linear`, the row at which each fused projection ends; None for
                :meth:`linear`.
            rank: of the adapter.

        Returns:
            A sentence for the log if something was measured or could not be, else None.
        """
        return None

    def lora_linear(
        self,
        x: torch.Tensor,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        ends: Sequence[int],
        scaling: float,
    ) -> torch.Tensor:
        """Returns :meth:`linear` plus the LoRA delta of one adapter, see
        :func:`add_lora_reference`; ``lora_b`` is prepacked.
        """
        return add_lora_reference(self.linear(x, weight, bias), x, lora_a, lora_b, ends, scaling)


class HopperBackend(Backend):
    """CUDA C++ for compute capability 9.0, see :mod:`qerl_verl.kernels.hopper`."""

    name = "hopper"
    description = "Hopper W4A16 (WGMMA, CUDA C++)"
    lora_rank_multiple = hopper.LORA_UNIT
    takes_adapter = True
    fused_row_multiple = hopper.layout.UNIT * hopper.layout.GROUP

    def unsupported_device(self, device):
        return _needs_cuda(device) or hopper.unsupported_device(device.index)

    def unsupported_weight(self, n, k, dtype):
        return hopper.unsupported_weight(n, k, dtype)

    def unsupported_adapter(self, n, k, rank, ends):
        return hopper.unsupported_adapter(n, k, rank, ends)

    def prepack(self, packed, scale):
        return hopper.prepack(packed, scale)

    def unpack(self, packed, scale):
        return hopper.unpack(packed, scale)

    def prepack_lora_b(self, b):
        return hopper.prepack_lora_b(b)

    def unpack_lora_b(self, b):
        return hopper.unpack_lora_b(b)

    def block_values(self, packed, scale, dtype):
        return hopper.block_values(packed, scale).to(dtype)

    def linear(self, x, weight, bias=None):
        return hopper.gemm(x, weight, bias)

    def decodes_first(self, tokens, n, k):
        return hopper.decodes_first(tokens, n, k)

    def tune(self, device, n, k, ends=None, rank=32):
        if device.type != "cuda":
            return None
        if ends is not None and hopper.unsupported_adapter(n, k, rank, ends):
            ends = None  # lora_linear then adds the LoRA delta to the output of the plain GEMM
        return hopper.tune(device, n, k, ends, rank)

    def lora_linear(self, x, weight, bias, lora_a, lora_b, ends, scaling):
        n, k = weight.packed.shape[0], weight.packed.shape[1] * 2
        if self.unsupported_adapter(n, k, lora_b.shape[1], ends) is None:
            return hopper.lora_gemm(x, weight, bias, lora_a, lora_b, ends, scaling)
        y = hopper.gemm(x, weight, bias)
        return add_lora_reference(y, x, lora_a, hopper.unpack_lora_b(lora_b), ends, scaling)


class TritonBackend(Backend):
    """Triton for every NVIDIA GPU, in the checkpoint's own layout, see
    :mod:`qerl_verl.kernels.triton`."""

    name = "triton"
    description = "Triton W4A16"

    def unsupported_device(self, device):
        return _needs_cuda(device) or triton_kernels.unsupported_device(device.index)

    def unsupported_weight(self, n, k, dtype):
        return triton_kernels.unsupported_weight(n, k, dtype)

    def unsupported_adapter(self, n, k, rank, ends):
        return triton_kernels.unsupported_adapter(n, k, rank, ends)

    def block_values(self, packed, scale, dtype):
        if dtype not in (torch.bfloat16, torch.float16):
            return super().block_values(packed, scale, dtype)
        return triton_kernels.block_values(packed, scale, dtype)

    def linear(self, x, weight, bias=None):
        return triton_kernels.gemm(x, weight, bias)

    def decodes_first(self, tokens, n, k):
        return triton_kernels.choose(tokens, n, k) == triton_kernels.tuning.DECODE_FIRST

    def tune(self, device, n, k, ends=None, rank=32):
        return triton_kernels.tune(device, n, k) if device.type == "cuda" else None

    def path(self, n, k):
        up_to = triton_kernels.tuning.decoded_inside_up_to(n, k)
        return None if up_to is None else f"decoded before the GEMM for more than {up_to} tokens"

    def lora_linear(self, x, weight, bias, lora_a, lora_b, ends, scaling):
        n, k = weight.packed.shape[0], weight.packed.shape[1] * 2
        if self.unsupported_adapter(n, k, lora_b.shape[1], ends):
            return super().lora_linear(x, weight, bias, lora_a, lora_b, ends, scaling)
        u = x @ lora_a.t()
        return triton_kernels.gemm(x, weight, bias, u if scaling == 1 else u * scaling, lora_b)


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it runs on CUDA, not on {device.type}"


BACKENDS: tuple[Backend, ...] = (HopperBackend(), TritonBackend(), Backend())
"""The best first."""


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapter that lives in a layer of the rollout.

    Attributes:
        rank: of each projection.
        ends: the row at which each fused projection ends.
    """

    rank: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """What computes a layer, and why.

    Attributes:
        backend: the candidate that was chosen.
        passed_over: ``not NAME: reason`` for each better candidate.
        setting: the setting that insists on ``backend``; None if ``auto`` chose it.
        adapter: why PyTorch adds the adapter to the kernel's output; None if the kernel computes it
            or there is no adapter.
        shape: ``(N, K)`` of the layer, if it was asked for.
    """

    backend: Candidate
    passed_over: tuple[str, ...] = ()
    setting: str | None = None
    adapter: str | None = None
    shape: tuple[int, int] | None = None

    def sentence(self, device: torch.device) -> str:
        """Says what runs where, and why nothing better does."""
        why = self.setting or "; ".join(self.passed_over)
        return f"{self.backend.description} on {_name_of(device)}" + (f" ({why})" if why else "")


def choose_backend(
    device: torch.device,
    shape: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    wanted: str = "auto",
    *,
    setting: str = "qerl.kernel",
    layer: str = "a layer",
    adapter: Adapter | None = None,
    candidates: Sequence[Candidate] = BACKENDS,
    elsewhere: Mapping[str, str] | None = None,
) -> Choice:
    """Decides what computes a layer.

    Args:
        device: where the layer computes.
        shape: ``(N, K)`` of its weight on this rank; None asks for the device alone.
        dtype: of its activations.
        wanted: ``auto`` takes the first of ``candidates`` that runs on the device and serves the
            layer; a name insists on it.
        setting: the setting that ``wanted`` comes from.
        layer: the layer's name, for messages.
        adapter: the adapter in the layer, or None.
        candidates: the best first; the last serves everything.
        elsewhere: name of a candidate -> why it cannot run for others that share the layer's bytes.

    Raises:
        ValueError: the name is unknown, or it cannot run here, does not serve the layer, or is
            meant to compute the adapter and cannot compute this one; gives the reason.
    """
    names = [c.name for c in candidates]
    if wanted != "auto" and wanted not in names:
        raise ValueError(f"{setting}={wanted}: choose one of auto, {', '.join(names)}")
    passed_over = []
    for candidate in candidates:
        if wanted not in ("auto", candidate.name):
            continue
        reason = candidate.unsupported_device(device) or (elsewhere or {}).get(candidate.name)
        if reason and candidate.name == wanted:
            raise ValueError(
                f"{setting}={wanted} cannot run on {_name_of(device)}: {reason}; use auto or another of {', '.join(names)}"
            )
        where = ""
        if reason is None and shape is not None:
            where, reason = f" of {shape[0]} x {shape[1]}", candidate.unsupported_weight(*shape, dtype)
        beside = None
        if reason is None and adapter is not None and shape is not None:
            beside = candidate.unsupported_adapter(*shape, candidate.padded_rank(adapter.rank), adapter.ends)
        if candidate.name == wanted:
            if reason:
                raise ValueError(f"{setting}={wanted} does not serve {layer}{where}: {reason}; use auto")
            if beside and candidate.takes_adapter:
                raise ValueError(f"{setting}={wanted} does not take the adapter of {layer}{where}: {beside}; use auto")
        if reason is None:
            return Choice(candidate, tuple(passed_over), None if wanted == "auto" else setting, beside, shape)
        passed_over.append(f"not {candidate.name}: {reason}")
    raise ValueError(f"nothing serves {layer}: {'; '.join(passed_over)}")


class KernelCount:
    """Counts the layers that each kernel computes, by the last part of their names (``down_proj``),
    and says why no better kernel does."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str | None], Counter[str]] = {}
        self._choices: dict[tuple[str, str | None], dict[tuple[int, int], Candidate]] = {}

    def add(self, layer: str, choice: Choice, device: torch.device) -> None:
        """Counts a layer; ``layer`` is its full name."""
        key = choice.sentence(device), choice.adapter
        self._kinds.setdefault(key, Counter())[layer.rpartition(".")[2]] += 1
        if choice.shape is not None:
            self._choices.setdefault(key, {})[choice.shape] = choice.backend

    @property
    def total(self) -> int:
        return sum(kinds.total() for kinds in self._kinds.values())

    def __str__(self) -> str:
        groups = sorted(self._kinds.items(), key=lambda group: -group[1].total())
        return "; ".join(self._group(*group) for group in groups)

    def _group(self, key: tuple[str, str | None], kinds: Counter[str]) -> str:
        sentence, beside = key
        number, counted = kinds.total(), ", ".join(f"{kind} {count}" for kind, count in kinds.items())
        text = f"{sentence}: {number} layer{'s' if number > 1 else ''} ({counted})"
        text += f", their adapter in PyTorch ({beside})" if beside else ""
        paths: dict[str, list[str]] = {}
        for shape, backend in self._choices.get(key, {}).items():
            if path := backend.path(*shape):
                paths.setdefault(path, []).append("{} x {}".format(*shape))
        return text + "".join(f", {' and '.join(shapes)} {path}" for path, shapes in paths.items())


def get_backend(name: str) -> Backend:
    """Returns a backend by name, whether or not it can run here."""
    return next(b for b in BACKENDS if b.name == name)


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
