"""Computes NVFP4 W4A16 layers of vLLM on our kernels or on vLLM's, with the adapter inside."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter

from qerl_verl.kernels.backends import Adapter, Backend, Choice, KernelCount, choose_backend, get_backend
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.log_lines import say
from qerl_verl.nvfp4.candidates import CANDIDATES, VLLMKernel
from qerl_verl.rollout.linear_lora import attach_adapter
from qerl_verl.rollout.lora import LoraSettings
from qerl_verl.rollout.shared_base import SharedWeights, shared_weights

SETTING = "qerl.rollout.kernel"

EXPERTS = ".experts"
"""End of the name of a layer's experts in vLLM."""

WEIGHTS = ("weight_packed", "weight_scale", "weight_global_scale")


class KernelReport:
    """Counts the layers of one engine and prints once which kernel computes how many.

    It prints when all layers that were built are loaded.
    """

    def __init__(self) -> None:
        self._count, self._built, self._experts = KernelCount(), 0, False

    def built(self) -> None:
        """Counts one more layer to be loaded."""
        self._built += 1

    def loaded(self, layer: str, choice: Choice, device: torch.device, lora: LoraSettings | None) -> None:
        """Counts a layer that has its weights. A later load (after a sleep at level 2) counts
        nothing.

        Args:
            layer: its full name.
            choice: the chosen kernel.
            device: where it computes.
            lora: the adapter in the layers, or None.
        """
        if self._count.total == self._built:
            return
        self._count.add(layer, choice, device)
        self._experts = self._experts or layer.endswith(EXPERTS)
        if self._count.total == self._built:
            adapter = (
                f"adapter of rank {lora.rank} in the layer" if lora else "adapter, if any, through vLLM's LoRA path"
            )
            if lora and self._experts:
                adapter += ", also in the experts" if lora.experts else ", none in the experts"
            # past vLLM's log level, which verl sets to WARN
            say(f"kernel: rollout NVFP4 linear = {self._count}; {adapter}")


class NVFP4Scheme(CompressedTensorsScheme):
    """Chooses the kernel of a layer when vLLM builds it, and passes all calls on to the scheme for
    it.

    Args:
        device: where the layer computes.
        kernel: ``auto``, or a name of :data:`CANDIDATES`.
        lora: the adapter in the layer, or None.
        vllm_scheme: makes vLLM's own scheme for 16-bit activations.
        report: report of the engine.

    Raises (from :meth:`create_weights`):
        ValueError: a requested kernel cannot run here, or does not serve the layer or its adapter;
        names the layer.
    """

    def __init__(
        self,
        device: torch.device,
        kernel: str,
        lora: LoraSettings | None,
        vllm_scheme: Callable[[], CompressedTensorsScheme],
        report: KernelReport,
    ):
        self.device, self.kernel, self.lora, self.vllm_scheme, self.report = device, kernel, lora, vllm_scheme, report
        self.inner: CompressedTensorsScheme  # made by create_weights

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def create_weights(
        self,
        layer: torch.nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        **kwargs,
    ) -> None:
        self.name = getattr(layer, "prefix", "") or "a layer"
        ends = tuple(itertools.accumulate(output_partition_sizes))
        self.choice = choose_backend(
            self.device,
            (ends[-1], input_size_per_partition),
            params_dtype,
            self.kernel,
            setting=SETTING,
            layer=self.name,
            adapter=Adapter(self.lora.rank, ends) if self.lora else None,
            candidates=CANDIDATES,
        )
        shared = shared_weights(self.name, output_partition_sizes, self.choice.backend.name)
        if isinstance(self.choice.backend, Backend):
            self.inner = QeRLNVFP4Scheme(self.choice.backend, self.lora, shared)
        else:
            scheme = self.vllm_scheme()
            self.choice = replace(self.choice, backend=VLLMKernel(type(scheme.kernel).__name__))
            self.inner = VLLMScheme(scheme, self.lora)
        self.report.built()
        self.inner.create_weights(
            layer=layer,
            output_partition_sizes=output_partition_sizes,
            input_size_per_partition=input_size_per_partition,
            params_dtype=params_dtype,
            **kwargs,
        )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)
        choice, backend = self.choice, self.choice.backend
        if self.lora and backend.takes_adapter and layer.qerl_row_factor is not None:
            reason = "its fused projections have a weight_global_scale each"
            if choice.setting:
                raise ValueError(
                    f"{SETTING}={backend.name} does not take the adapter of {self.name}: {reason}; use auto"
                )
            choice = replace(choice, adapter=reason)
        self.report.loaded(self.name, choice, self.device, self.lora)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.inner.apply_weights(layer, x, bias)


def _register_input_scale(layer: torch.nn.Module, parts: int, weight_loader: Callable) -> None:
    """Registers a parameter for ``input_global_scale`` of llm-compressor's W4A4 checkpoints.

    It is loaded and dropped, because activations stay in 16 bits.
    """
    scale = PerTensorScaleParameter(data=torch.ones(parts, dtype=torch.float32), weight_loader=weight_loader)
    layer.register_parameter("input_global_scale", scale)


def _register_row_factor(layer: torch.nn.Module, scales: list[float], applied: float) -> None:
    """Gives a layer the buffer ``qerl_row_factor`` ``[N]``, which multiplies its output.

    It is None where the fused projections share a scale, and needed where they were quantized one
    by one.

    Args:
        layer: has vLLM's ``logical_widths``.
        scales: ``weight_global_scale`` of each projection.
        applied: the scale that the kernel divides by.
    """
    factor = None
    if any(s != applied for s in scales):
        factors = torch.tensor([applied / s for s in scales], device=layer.weight_packed.device)
        factor = factors.repeat_interleave(torch.tensor(layer.logical_widths, device=factors.device))
    layer.register_buffer("qerl_row_factor", factor, persistent=False)


class QeRLNVFP4Scheme(CompressedTensorsScheme):
    """Computes 16-bit activations with an NVFP4 weight in the layout of a backend
    (:mod:`qerl_verl.kernels.backends`).

    Args:
        backend: the kernels of the layer.
        lora: the adapter in the layer, or None.
        shared: weight of a base that another process has loaded and laid out; None where the layer
            has its own. Where its projections are laid out one by one, each is a GEMM of its own.
    """

    def __init__(self, backend: Backend, lora: LoraSettings | None = None, shared: SharedWeights | None = None):
        self.backend, self.lora, self.shared = backend, lora, shared
        self.whole = shared is None or shared.whole

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    def create_weights(
        self,
        layer: torch.nn.Module,
        output_partition_sizes: list[int],
        input_size_per_partition: int,
        params_dtype: torch.dtype,
        weight_loader: Callable,
        **kwargs,
    ) -> None:
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        if columns % BLOCK_SIZE:
            raise ValueError(
                f"{columns} input channels per tensor-parallel rank are not a multiple of "
                f"{BLOCK_SIZE}: choose another actor_rollout_ref.rollout.tensor_model_parallel_size"
            )
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = columns
        layer.output_size_per_partition = rows
        self.dtype = params_dtype
        if self.shared is not None:
            for name, tensor in zip(WEIGHTS, self.shared[:3], strict=True):
                layer.register_parameter(name, Parameter(tensor, requires_grad=False))
            return
        matrix = {"input_dim": 1, "output_dim": 0, "weight_loader": weight_loader}
        layer.register_parameter(
            "weight_packed", ModelWeightParameter(data=torch.empty(rows, columns // 2, dtype=torch.uint8), **matrix)
        )
        layer.register_parameter(
            "weight_scale",
            GroupQuantScaleParameter(
                data=torch.empty(rows, columns // BLOCK_SIZE, dtype=torch.float8_e4m3fn), **matrix
            ),
        )
        parts = len(output_partition_sizes)
        layer.register_parameter(
            "weight_global_scale",
            PerTensorScaleParameter(data=torch.ones(parts, dtype=torch.float32), weight_loader=weight_loader),
        )
        _register_input_scale(layer, parts, weight_loader)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed = layer.weight_packed.data
        if self.shared is None:
            del layer.input_global_scale
            packed, scale = self.backend.prepack(packed, layer.weight_scale.data.view(torch.uint8))
            layer.weight_packed = Parameter(packed, requires_grad=False)
            layer.weight_scale = Parameter(scale, requires_grad=False)
            layer.weight_global_scale = Parameter(layer.weight_global_scale.data, requires_grad=False)
        scales = layer.weight_global_scale.tolist()
        self.global_scale, self.global_scales = scales[0], scales
        _register_row_factor(layer, scales if self.whole else scales[:1], scales[0])
        if self.lora is not None:
            attach_adapter(layer, self.lora, self.backend, self.dtype, packed.device, self.whole)
        self._tune(layer, packed.device)

    def _tune(self, layer: torch.nn.Module, device: torch.device) -> None:
        """Chooses the launches of this layer's GEMM, before any of them is captured into a CUDA
        graph.
        """
        columns, inside = layer.input_size_per_partition, self.lora is not None and layer.qerl_row_factor is None
        rank = layer.qerl_adapter.rank(layer) if inside else 0
        fused = tuple(itertools.accumulate(layer.logical_widths))
        for ends in [fused] if self.whole else [(rows,) for rows in layer.logical_widths]:
            if said := self.backend.tune(device, ends[-1], columns, ends if inside else None, rank):
                say(f"kernel: rollout, {said}")

    def _apply_by_part(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        begin, outputs = 0, []
        for index, (rows, scale) in enumerate(zip(layer.logical_widths, self.global_scales, strict=True)):
            packed, scales = (t.narrow(0, begin, rows) for t in (layer.weight_packed, layer.weight_scale))
            weight, own = PackedWeight(packed, scales, scale), None if bias is None else bias.narrow(0, begin, rows)
            if self.lora is None:
                outputs.append(self.backend.linear(x, weight, own))
            else:
                outputs.append(layer.qerl_adapter.part(layer, index, x, weight, own))
            begin += rows
        return torch.cat(outputs, dim=-1)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not self.whole:
            return self._apply_by_part(layer, x, bias)
        weight = PackedWeight(layer.weight_packed, layer.weight_scale, self.global_scale)
        if layer.qerl_row_factor is not None:
            y = (self.backend.linear(x, weight) * layer.qerl_row_factor).to(x.dtype)
            y = y if bias is None else y + bias
            return y if self.lora is None else layer.qerl_adapter.add(layer, y, x)
        if self.lora is None:
            return self.backend.linear(x, weight, bias)
        return layer.qerl_adapter.linear(layer, x, weight, bias)


class VLLMScheme(CompressedTensorsScheme):
    """Uses vLLM's scheme for the base (Marlin), and adds an adapter in the layer by two small
    GEMMs.

    vLLM's scheme for 16-bit activations registers no ``input_global_scale``
    (compressed_tensors_w4a4_nvfp4.py, create_weights with ``use_a16``), and its loader fails on a
    checkpoint that has one.
    """

    def __init__(self, inner: CompressedTensorsScheme, lora: LoraSettings | None):
        self.inner, self.lora = inner, lora

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    def create_weights(self, layer: torch.nn.Module, params_dtype: torch.dtype, **kwargs) -> None:
        self.dtype = params_dtype
        self.inner.create_weights(layer=layer, params_dtype=params_dtype, **kwargs)
        if not hasattr(layer, "input_global_scale"):
            _register_input_scale(layer, len(kwargs["output_partition_sizes"]), kwargs["weight_loader"])

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        device = layer.weight_packed.device
        scales = layer.weight_global_scale.tolist()
        _register_row_factor(layer, scales, max(scales))  # vLLM takes the largest for all
        bias = getattr(layer, "bias", None)  # vLLM permutes it for a kernel that adds it itself
        bias = None if bias is None or layer.qerl_row_factor is None else bias.detach().clone()
        layer.register_buffer("qerl_bias", bias, persistent=False)
        del layer.input_global_scale
        self.inner.process_weights_after_loading(layer)
        if self.lora is not None:
            attach_adapter(layer, self.lora, get_backend("pytorch"), self.dtype, device)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if layer.qerl_row_factor is None:
            y = self.inner.apply_weights(layer, x, bias=bias)
        else:
            y = (self.inner.apply_weights(layer, x, bias=None) * layer.qerl_row_factor).to(x.dtype)
            y = y if bias is None else y + layer.qerl_bias
        return y if self.lora is None else layer.qerl_adapter.add(layer, y, x)


class AdapterOnLinear(UnquantizedLinearMethod):
    """Adds the adapter in the layer to vLLM's method for a linear in 16 bits.

    Args:
        lora: the adapter.
    """

    def __init__(self, lora: LoraSettings):
        super().__init__()
        self.lora = lora

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = input_size_per_partition

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight = layer.weight  # on a CPU vLLM replaces it by an order of its own
        super().process_weights_after_loading(layer)
        attach_adapter(layer, self.lora, get_backend("pytorch"), weight.dtype, weight.device)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.qerl_adapter.add(layer, super().apply(layer, x, bias), x)
