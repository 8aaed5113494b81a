"""Replaces vLLM's ``compressed-tensors`` quantization where weights are NVFP4.

The class is registered over vLLM's through the public ``register_quantization_config``, in QeRL's
jobs only. Weights are used with 16-bit activations, whatever the checkpoint says about activations,
on a kernel of this package or of vLLM (:mod:`qerl_verl.rollout.scheme`). The adapter is inside the
layer or on vLLM's own LoRA path. vLLM's ``additional_config`` says what to use, under ``qerl``:
``kernel`` (``auto`` or a name of :data:`CANDIDATES`) and ``lora`` (rank and alpha, or null).
"""

from __future__ import annotations

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from qerl_verl.job import LoraSettings, RolloutLayers
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.unused_tensors import KV_CACHE_SCALE
from qerl_verl.rollout.experts import experts_method
from qerl_verl.rollout.lora import lora_settings
from qerl_verl.rollout.scheme import AdapterOnLinear, KernelReport, NVFP4Scheme
from qerl_verl.rollout.shared_base import shared_embedding

QUANT_FORMAT = "qerl-nvfp4-pack-quantized"
"""Name of the format inside vLLM. verl takes ``nvfp4-pack-quantized`` for its QAT: it patches vLLM
for that and then keeps the first adapter for ever (verl/workers/rollout/vllm_rollout/utils.py,
vLLMColocateWorkerExtension)."""

WITHOUT_ADAPTER = (".mlp.gate", ".linear_attn.in_proj_ba")
"""Ends of the names of a mixture's router and of the small linears of a delta net, which stay in 16
bits and have no adapter."""


class QeRLCompressedTensorsConfig(CompressedTensorsConfig):
    """vLLM's configuration of ``compressed-tensors`` with another choice of the NVFP4 scheme.

    A ``kv_cache_scheme`` is dropped. vLLM would serve an FP8 cache from it, which the actor does
    not have. The cache has the dtype of vLLM's ``kv_cache_dtype``, and the checkpoint's scales for
    it are not loaded.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kv_cache_scheme = None
        if self.quant_format == "nvfp4-pack-quantized":
            self.quant_format = QUANT_FORMAT
        self.qerl_report = KernelReport()

    def _get_scheme_from_parts(self, weight_quant, input_quant, *args, **kwargs):
        if not self._is_nvfp4(weight_quant):
            return super()._get_scheme_from_parts(weight_quant, input_quant, *args, **kwargs)
        return NVFP4Scheme(
            *self._settings(),
            lambda: super(QeRLCompressedTensorsConfig, self)._get_scheme_from_parts(
                weight_quant, None, *args, **kwargs
            ),
            self.qerl_report,
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        """Returns vLLM's method for a layer, or another one in these cases:

        - experts in NVFP4;
        - linears of the decoder in 16 bits, which get buffers for the adapter;
        - an embedding or output layer in the actor's memory.
        """
        if isinstance(layer, RoutedExperts) and (parts := self._nvfp4_experts(layer, prefix)):
            input_scales = parts.get("input_activations") is not None
            return experts_method(layer, prefix, *self._settings(), input_scales, self.qerl_report)
        method = super().get_quant_method(layer, prefix)
        if method is None and isinstance(layer, VocabParallelEmbedding):
            return shared_embedding(layer)
        if type(method) is not UnquantizedLinearMethod or prefix.endswith(WITHOUT_ADAPTER):
            # vLLM also calls this for attention after a reload, without a configuration
            return method
        config = get_current_vllm_config()
        lora = lora_settings(config.additional_config)
        if lora is None or get_architecture(config.model_config.hf_config).is_of_tower(prefix):
            return method
        return AdapterOnLinear(lora)

    @staticmethod
    def _settings() -> tuple[torch.device, str, LoraSettings | None]:
        """Returns device, kernel setting and adapter of the engine that is being built."""
        additional = get_current_vllm_config().additional_config
        on_cpu = current_platform.is_cpu()
        return (
            torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
            (RolloutLayers.of_engine(additional) or RolloutLayers()).kernel,
            lora_settings(additional),
        )

    def _nvfp4_experts(self, layer: RoutedExperts, name: str) -> dict | None:
        """Returns how the checkpoint quantizes the experts of a layer.

        The result is None where not all of them are NVFP4; vLLM serves or refuses these.
        """
        self._add_fused_moe_to_target_scheme_map()
        parts = [self.get_scheme_dict(layer, f"{name}.0.{linear}") for linear in ("gate_proj", "up_proj", "down_proj")]
        same = parts[0] is not None and all(part == parts[0] for part in parts)
        return parts[0] if same and self._is_nvfp4(parts[0].get("weights")) else None

    @staticmethod
    def get_cache_scale_mapper():
        """Drops the names under which vLLM would load scales of a KV cache.

        The scales of an ``attn_head`` scheme, one for each head, would not fit into a layer without
        the scheme.
        """
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_regex={KV_CACHE_SCALE: None})

    @staticmethod
    def _is_nvfp4(weight_quant) -> bool:
        return (
            weight_quant is not None
            and weight_quant.num_bits == 4
            and weight_quant.group_size == BLOCK_SIZE
            and str(getattr(weight_quant.type, "value", weight_quant.type)) == "float"
        )


def register_quantization() -> None:
    """Makes vLLM use :class:`QeRLCompressedTensorsConfig` for ``compressed-tensors`` in this
    process.
    """
    register_quantization_config("compressed-tensors")(QeRLCompressedTensorsConfig)
