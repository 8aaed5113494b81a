"""FSDP2 engine of verl with an NVFP4 base and LoRA adapters (verl/workers/engine/fsdp/transformer_impl.py)."""

from __future__ import annotations

import logging
import os
import warnings

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.fs import copy_to_local
from verl.utils.fsdp_utils import collect_lora_params
from verl.utils.model import get_hf_auto_model_class
from verl.utils.py_functional import convert_to_regular_types
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from qerl_verl.lora.peft import linear_names, register_nvfp4, save_adapter
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, swap_linears

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))

ADAPTER_FOLDER = "lora_adapter"
"""Folder of a checkpoint's ``actor`` folder that holds the adapter in PEFT's format."""


class NVFP4EngineWithLMHead(FSDPEngineWithLMHead):
    """Actor and reference policy: NVFP4 base, frozen, sharded as bytes; LoRA adapters in float32.

    The model path must be a folder in the format ``nvfp4-pack-quantized``; the switch sees to that.
    """

    def _build_module(self) -> nn.Module:
        """The base on the CPU of the mesh's first rank and on the meta device of the others, as verl does it.

        What is not packed (embeddings, norms, output layer, biases) stays in bfloat16: nothing of it is trained.
        """
        config, path = self.model_config.hf_config, self.model_config.local_path
        dtype = torch.bfloat16
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = get_hf_auto_model_class(hf_config=config).from_config(
                config, dtype=dtype, trust_remote_code=self.model_config.trust_remote_code
            )
        packed = packed_linear_names(path)
        swap_linears(module, packed, dtype, storage_dtype=self._fsdp_param_dtype())
        module.requires_grad_(False)
        if self.rank == 0:
            load_tensors(module, path, dtype)
            print(
                f"[qerl] kernel: actor NVFP4 linear = PyTorch reference (dequantize to {dtype}, matrix product) on "
                f"{self._device_type()}, {len(packed)} layers, attention {config._attn_implementation}",
                flush=True,
            )
        else:
            module.tie_weights()
        apply_monkey_patch(
            model=module,
            use_remove_padding=self.use_remove_padding,
            ulysses_sp_size=self.ulysses_sequence_parallel_size,
            use_fused_kernels=self.model_config.use_fused_kernels,
            fused_kernels_backend=(self.model_config.fused_kernel_options or {}).get("impl_backend"),
        )
        if self.model_config.enable_gradient_checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return module

    def _fsdp_param_dtype(self) -> torch.dtype:
        """The dtype that FSDP2's mixed precision casts to, read as verl reads it (_build_fsdp_module)."""
        settings = self.engine_config.mixed_precision
        return torch.bfloat16 if settings is None else PrecisionType.to_dtype(settings.get("param_dtype", "bf16"))

    @staticmethod
    def _device_type() -> str:
        from verl.utils.device import get_device_name

        return get_device_name()

    def _build_lora_module(self, module: nn.Module) -> nn.Module:
        """PEFT's LoRA with float32 master weights; FSDP2 casts them to bfloat16 for the forward pass."""
        module.enable_input_require_grads()
        adapter = self.model_config.lora_adapter_path
        if adapter is not None:
            folder = copy_to_local(adapter, use_shm=self.model_config.use_shm)
            config = LoraConfig.from_pretrained(folder)
            config.inference_mode = False
            module = PeftModel.from_pretrained(
                module, folder, is_trainable=True, config=register_nvfp4(config), autocast_adapter_dtype=True
            )
            if isinstance(module.peft_config["default"].task_type, str):
                module.peft_config["default"].task_type = TaskType.CAUSAL_LM
        else:
            targets = convert_to_regular_types(self.model_config.target_modules)
            config = LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=self.model_config.lora_rank,
                lora_alpha=self.model_config.lora_alpha,
                target_modules=linear_names(module) if targets == "all-linear" else targets,
                exclude_modules=convert_to_regular_types(self.model_config.exclude_modules),
                bias="none",
            )
            module = get_peft_model(module, register_nvfp4(config))
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return module

    def _build_optimizer(self, module: nn.Module):
        """The optimizer sees the adapters alone: neither its state nor its checkpoint knows the base."""
        from verl.workers.config.optimizer import build_optimizer

        return build_optimizer([p for p in module.parameters() if p.requires_grad], self.optimizer_config)

    def save_checkpoint(self, local_path: str, hdfs_path=None, global_step: int = 0, max_ckpt_to_keep=None, **kwargs):
        """verl's checkpoint (adapter, optimizer, scheduler, random state), and the adapter in PEFT's format beside it."""
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)
        tensors = collect_lora_params(module=self.module, layered_summon=False, base_sync_done=True)
        if self.rank == 0:
            save_adapter(
                os.path.join(local_path, ADAPTER_FOLDER),
                tensors,
                self.module.peft_config["default"],
                base_model=self.model_config.path,
            )
        torch.distributed.barrier()
