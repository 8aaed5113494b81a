"""verl's FSDP2 engine on an NF4 base (QLoRA, arXiv 2305.14314), quantized by bitsandbytes through
transformers.

Each rank quantizes the 16-bit checkpoint when it loads it, in blocks of 64 weights with double
quantization, as vLLM's bitsandbytes loader does for the rollout. The packed weights are replicated
on every rank: bitsandbytes keeps their scales as attributes of the parameter, which FSDP2 would
lose when it replaces the parameter by a shard. FSDP2 shards everything else: trained parameters,
embeddings, norms and the output layer.
"""

from __future__ import annotations

import warnings

import bitsandbytes
import torch
from peft import TaskType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from transformers import BitsAndBytesConfig
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import apply_fsdp2
from verl.utils.model import get_hf_auto_model_class
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from qerl_verl.engine.adapter import AdapterEngineMixin


class NF4EngineWithLMHead(AdapterEngineMixin, FSDPEngineWithLMHead):
    """The engine of the actor and, with the adapter disabled, of the reference policy."""

    role = "actor"
    task_type = TaskType.CAUSAL_LM

    def _build_module(self) -> nn.Module:
        """Returns the base on this rank's device: linears of the decoder layers in NF4,
        everything else in 16 bits."""
        compute_dtype = self._dtypes()[0]
        dtype = torch.float16 if compute_dtype == torch.float16 else torch.bfloat16
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = get_hf_auto_model_class(hf_config=self.model_config.hf_config).from_pretrained(
                self.model_config.local_path,
                dtype=dtype,
                config=self.model_config.hf_config,
                quantization_config=quantization,
                device_map={"": get_device_id()},
                trust_remote_code=self.model_config.trust_remote_code,
            )
        layers = [layer for layer in module.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
        for layer in layers:
            # On a CPU with AVX512-BF16, a forward pass without gradients would repack the weight
            # for good into a layout that has no backward pass (bitsandbytes/nn/modules.py,
            # Linear4bit.forward).
            layer.support_avx512bf16_for_cpu = False
        self._say(f"kernel: {self.role} NF4 linear = bitsandbytes {bitsandbytes.__version__}, {len(layers)} layers")
        self._patch_forward(module, self.model_config.use_fused_kernels)
        if self.model_config.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        """Wraps everything but the packed weights in FSDP2. Replaces verl's method.

        Every rank has read the whole base and initialized the same adapter, so rank 0 sends
        nothing.
        """
        compute_dtype, reduce_dtype = self._dtypes()
        self._autocast_dtype = compute_dtype
        self.scaler = ShardedGradScaler(growth_interval=400) if compute_dtype == torch.float16 else None
        packed = {p for p in module.parameters() if isinstance(p, bitsandbytes.nn.Params4bit)}
        options = {
            "mesh": self.device_mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype),
            "reshard_after_forward": self.engine_config.reshard_after_forward,
            "ignored_params": packed,
        }
        apply_fsdp2(module, options, self.engine_config)
        return module
