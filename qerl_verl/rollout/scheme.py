"""NVFP4 W4A16 layers of vLLM on our kernels, with the adapter inside."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter

from qerl_verl.kernels.backends import backend_for, get_backend
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference
from qerl_verl.rollout.lora import LoraSettings, attach_adapter


class QeRLNVFP4Scheme(CompressedTensorsScheme):
    """16-bit activations, NVFP4 weight in the layout of the chosen backend (:mod:`qerl_verl.kernels.backends`).

    Args:
        kernel: ``auto`` or a backend's name.
        lora: of the adapter that lives in the layer, or None.
    """

    def __init__(self, kernel: str = "auto", lora: LoraSettings | None = None):
        self.kernel, self.lora = kernel, lora

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
                f"{columns} input channels per tensor-parallel rank are not a multiple of {BLOCK_SIZE}: choose another "
                "actor_rollout_ref.rollout.tensor_model_parallel_size"
            )
        layer.logical_widths = output_partition_sizes
        layer.input_size_per_partition = columns
        layer.output_size_per_partition = rows
        layer.qerl_dtype = params_dtype
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
        for name in ("weight_global_scale", "input_global_scale"):
            layer.register_parameter(
                name,
                PerTensorScaleParameter(
                    data=torch.ones(len(output_partition_sizes), dtype=torch.float32), weight_loader=weight_loader
                ),
            )

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        del layer.input_global_scale  # of llm-compressor's W4A4 checkpoints; activations stay in 16 bits here
        packed, scale = layer.weight_packed.data, layer.weight_scale.data.view(torch.uint8)
        layer.qerl_backend = backend_for(
            packed.device, packed.shape[0], packed.shape[1] * 2, layer.qerl_dtype, self.kernel
        )
        packed, scale = layer.qerl_backend.prepack(packed, scale)
        layer.weight_packed = Parameter(packed, requires_grad=False)
        layer.weight_scale = Parameter(scale, requires_grad=False)
        layer.weight_global_scale = Parameter(layer.weight_global_scale.data, requires_grad=False)
        scales = layer.weight_global_scale.tolist()
        layer.qerl_alpha = 1.0 / scales[0]
        row_factor = None
        if any(s != scales[0] for s in scales):  # fused projections that were quantized one by one
            widths = torch.tensor(layer.logical_widths, device=packed.device)
            factors = torch.tensor([scales[0] / s for s in scales], device=packed.device)
            row_factor = factors.repeat_interleave(widths)
        layer.register_buffer("qerl_row_factor", row_factor, persistent=False)
        if self.lora is not None:
            attach_adapter(layer, self.lora, layer.qerl_backend, layer.qerl_dtype, packed.device)
        self._tune(layer, packed.device)

    def _tune(self, layer: torch.nn.Module, device: torch.device) -> None:
        """Choose the launches of this layer's GEMM, before any of them is captured into a CUDA graph."""
        ends, rank = None, 0
        if self.lora is not None and layer.qerl_row_factor is None:
            ends, rank = layer.qerl_lora_ends, layer.qerl_lora_b.shape[1]
        rows, columns = layer.output_size_per_partition, layer.input_size_per_partition
        if said := layer.qerl_backend.tune(device, rows, columns, ends, rank):
            print(f"[qerl] kernel: rollout, {said}", flush=True)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        backend, weight, alpha = layer.qerl_backend, (layer.weight_packed, layer.weight_scale), layer.qerl_alpha
        if layer.qerl_row_factor is not None:
            y = (backend.linear(x, *weight, alpha) * layer.qerl_row_factor).to(x.dtype)
            y = y if bias is None else y + bias
            if self.lora is None:
                return y
            b = backend.unpack_lora_b(layer.qerl_lora_b)
            return add_lora_reference(y, x, layer.qerl_lora_a, b, layer.qerl_lora_ends, layer.qerl_lora_scaling)
        if self.lora is None:
            return backend.linear(x, *weight, alpha, bias)
        return backend.lora_linear(
            x, *weight, alpha, bias, layer.qerl_lora_a, layer.qerl_lora_b, layer.qerl_lora_ends, layer.qerl_lora_scaling
        )


class AdapterOnVLLMScheme(CompressedTensorsScheme):
    """A scheme of vLLM's for the base (Marlin), with the adapter in the layer, added by two small matrix products."""

    def __init__(self, inner: CompressedTensorsScheme, lora: LoraSettings):
        self.inner, self.lora = inner, lora

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    def create_weights(self, layer: torch.nn.Module, params_dtype: torch.dtype, **kwargs) -> None:
        layer.qerl_dtype = params_dtype
        self.inner.create_weights(layer=layer, params_dtype=params_dtype, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        device = layer.weight_packed.device
        self.inner.process_weights_after_loading(layer)
        attach_adapter(layer, self.lora, get_backend("pytorch"), layer.qerl_dtype, device)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = self.inner.apply_weights(layer, x, bias=bias)
        return add_lora_reference(
            y, x, layer.qerl_lora_a, layer.qerl_lora_b, layer.qerl_lora_ends, layer.qerl_lora_scaling
        )
