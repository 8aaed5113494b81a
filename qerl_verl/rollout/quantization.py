"""vLLM's ``compressed-tensors`` quantization, with NVFP4 weights served QeRL's way.

Registered over vLLM's own through its public ``register_quantization_config``, in QeRL's jobs only. Two differences:
weights are used with 16-bit activations whatever the checkpoint says about activations, and on the CPU, for which vLLM has
no NVFP4 kernel, a scheme of ours computes the product. On CUDA the kernel is vLLM's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsScheme
from vllm.model_executor.parameter import GroupQuantScaleParameter, ModelWeightParameter, PerTensorScaleParameter
from vllm.platforms import current_platform

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear_reference

QUANT_FORMAT = "qerl-nvfp4-pack-quantized"
"""Our name for the format inside vLLM. verl takes ``nvfp4-pack-quantized`` for its QAT, patches vLLM for that and
then keeps the first adapter for ever (verl/workers/rollout/vllm_rollout/utils.py, vLLMColocateWorkerExtension)."""


@functools.cache
def _say(text: str) -> None:
    """Once a process, past vLLM's log level, which verl sets to WARN."""
    print(f"[qerl] {text}", flush=True)


class NVFP4ReferenceScheme(CompressedTensorsScheme):
    """W4A16 with the PyTorch reference: unpack the weight, multiply, once a call."""

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
        for name in ("weight_packed", "weight_scale", "weight_global_scale"):
            setattr(layer, name, Parameter(getattr(layer, name).data, requires_grad=False))
        scales = layer.weight_global_scale.tolist()
        layer.nvfp4_alpha = 1.0 / scales[0]
        layer.nvfp4_row_factor = None
        if any(s != scales[0] for s in scales):  # fused projections that were quantized one by one
            widths = torch.tensor(layer.logical_widths, device=layer.weight_packed.device)
            factors = torch.tensor([scales[0] / s for s in scales], device=widths.device)
            layer.nvfp4_row_factor = factors.repeat_interleave(widths)

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if layer.nvfp4_row_factor is None:
            return nvfp4_linear_reference(x, layer.weight_packed, layer.weight_scale, layer.nvfp4_alpha, bias)
        y = nvfp4_linear_reference(x, layer.weight_packed, layer.weight_scale, layer.nvfp4_alpha)
        y = (y * layer.nvfp4_row_factor).to(x.dtype)
        return y if bias is None else y + bias


class QeRLCompressedTensorsConfig(CompressedTensorsConfig):
    """vLLM's configuration of ``compressed-tensors``, with the choice of the NVFP4 scheme replaced."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.quant_format == "nvfp4-pack-quantized":
            self.quant_format = QUANT_FORMAT

    def _get_scheme_from_parts(self, weight_quant, input_quant, *args, **kwargs):
        if not self._is_nvfp4(weight_quant):
            return super()._get_scheme_from_parts(weight_quant, input_quant, *args, **kwargs)
        if current_platform.is_cpu():
            _say("kernel: rollout NVFP4 linear = PyTorch reference (dequantize, matrix product) on cpu")
            return NVFP4ReferenceScheme()
        scheme = super()._get_scheme_from_parts(weight_quant, None, *args, **kwargs)
        kernel = getattr(scheme, "kernel", None)
        _say(
            f"kernel: rollout NVFP4 linear = vLLM's {type(kernel or scheme).__name__} on {current_platform.device_name}"
        )
        return scheme

    @staticmethod
    def _is_nvfp4(weight_quant) -> bool:
        return (
            weight_quant is not None
            and weight_quant.num_bits == 4
            and weight_quant.group_size == BLOCK_SIZE
            and str(getattr(weight_quant.type, "value", weight_quant.type)) == "float"
        )


def register_quantization() -> None:
    """Make vLLM use :class:`QeRLCompressedTensorsConfig` for ``compressed-tensors`` checkpoints in this process."""
    register_quantization_config("compressed-tensors")(QeRLCompressedTensorsConfig)
