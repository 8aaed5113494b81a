"""Provides FSDP2 engines of verl with an NVFP4 base
(verl/workers/engine/fsdp/transformer_impl.py)."""

from __future__ import annotations

import socket

import torch
from peft import (
    TaskType,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from verl.utils.activation_offload import enable_activation_offloading
from verl.utils.device import get_device_id
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict
from verl.utils.torch_functional import entropy_from_logits, entropy_from_logits_with_chunking
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from qerl_verl.engine.adapter import AdapterEngineMixin
from qerl_verl.engine.compile import compile_layers, unavailable
from qerl_verl.engine.output_layer import use_logprob_layer
from qerl_verl.engine.recompute import Recompute
from qerl_verl.engine.shared_base import causal_lm, use_shared_base
from qerl_verl.job import this_job
from qerl_verl.kernels.backends import BACKENDS
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, prepack_linears, swap_linears

CARRIER = torch.float32
"""The dtype as which FSDP2 holds and gathers the packed bytes. Up to PyTorch 2.11 it takes no
integer parameters (torch/distributed/fsdp/_fully_shard/_fsdp_param.py, _init_sharded_param). 16-bit
floating-point types will not do: the ``torch._foreach_copy_`` in front of the all-gather
(_fsdp_collectives.py, all_gather_copy_in) takes their values through float32 on a GPU, and where
the bytes look like a NaN it writes another NaN."""


def unsupported_elsewhere(device: torch.device) -> dict[str, str]:
    """Returns why a backend that runs on ``device`` does not run on another rank's device, or None.
    A collective call.

    FSDP2 gathers the bytes in the layout of rank 0, so every rank has to compute with the same
    backend.
    """
    own = {backend.name: backend.unsupported_device(device) for backend in BACKENDS}
    if not torch.distributed.is_initialized():
        return {}
    gathered: list[tuple[str, dict]] = [("", {})] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (socket.gethostname(), own))
    return {
        name: f"{reason} (rank {rank} on {host})"
        for rank, (host, reasons) in reversed(list(enumerate(gathered)))
        for name, reason in reasons.items()
        if reason and own[name] is None
    }


class NVFP4EngineMixin:
    """Builds the NVFP4 base of actor and critic: frozen, and sharded as bytes.

    Stands in front of :class:`AdapterEngineMixin` in the bases of a class. The model path must be a
    folder in the format ``nvfp4-pack-quantized``; the switch sees to that.
    """

    def _empty_module(self, config, dtype: torch.dtype) -> nn.Module:
        """Returns the model in ``dtype`` on the meta device, except for ``new_modules``, which are
        real on rank 0. Each engine defines this method.
        """
        raise NotImplementedError(type(self).__name__)

    def _build_module(self) -> nn.Module:
        """Returns the base on the CPU of the mesh's first rank, and on the meta device of the other
        ranks, as verl's method does.

        All unpacked tensors (embeddings, norms, output layer, biases) are in 16 bits, since none of
        them is trained.
        """
        config, path = self.model_config.hf_config, self.model_config.local_path
        compute_dtype = self._dtypes()[0]
        dtype = torch.float16 if compute_dtype == torch.float16 else torch.bfloat16
        module = self._empty_module(config, dtype)
        packed = packed_linear_names(path)
        swap_linears(module, packed, dtype, storage_dtype=CARRIER)
        module.requires_grad_(False)
        device = torch.device(self._device_type(), get_device_id() if self._device_type() == "cuda" else None)
        wanted = this_job().settings.kernel
        kernel = None
        if not self.engine_config.forward_only:
            serves = self.task_type == TaskType.CAUSAL_LM
            kernel = use_shared_base(module, self.model_config, device, dtype, compute_dtype, wanted, serves)
        if kernel is None:
            if self.rank == 0:
                load_tensors(module, path, dtype, new_modules=self.new_modules)
            else:
                module.tie_weights()
            kernel = prepack_linears(module, device, wanted, compute_dtype, unsupported_elsewhere(device))
        self._say(f"kernel: {self.role} NVFP4 linear = {kernel}; attention {config._attn_implementation}")
        self._patch_forward(module, use_fused_kernels=False)
        if self.model_config.use_fused_kernels and self.task_type == TaskType.CAUSAL_LM:
            use_logprob_layer(module)  # in place of verl's fused kernels
        if self.model_config.enable_gradient_checkpointing:
            self._recompute = Recompute(this_job().settings.recompute, device, self._say_recompute)
            checkpointing = {
                "use_reentrant": False,
                "context_fn": self._recompute.context_fn,
                "preserve_rng_state": self._draws_random_numbers(config),
            }
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        if self.engine_config.use_torch_compile:
            if reason := unavailable(device):
                chunked = self.engine_config.entropy_from_logits_with_chunking
                self.compute_entropy_from_logits = entropy_from_logits_with_chunking if chunked else entropy_from_logits
            said = f"nothing: {reason}" if reason else compile_layers(module)
            self._say(f"compile: {self.role}, {said}")
        return module

    def _say_recompute(self, text: str) -> None:
        self._say(f"recompute: {self.role}, {text}")

    def _draws_random_numbers(self, config) -> bool:
        """Returns whether the recomputation of a layer has to draw the same random numbers as its
        first run, because the base or an adapter of the user's has dropout.
        """
        settings = config.to_dict() | config.get_text_config().to_dict()
        dropout = any(value for name, value in settings.items() if "dropout" in name)
        return dropout or self.model_config.lora_adapter_path is not None

    def _build_fsdp_module(self, module: nn.Module) -> nn.Module:
        """Wraps a base whose packed bytes are parameters of dtype :data:`CARRIER` in FSDP2.
        Replaces verl's method.

        verl lets FSDP2 cast parameters to ``mixed_precision.param_dtype`` before the all-gather,
        which would destroy the bytes. In 16 bits this method has FSDP2 cast nothing: frozen
        parameters have that dtype already, and the layers cast their float32 adapters.
        """
        compute_dtype, reduce_dtype = self._dtypes()
        self._autocast_dtype = compute_dtype
        self.scaler = ShardedGradScaler(growth_interval=400) if compute_dtype == torch.float16 else None
        offload = None
        if self.engine_config.offload_policy or self.engine_config.forward_only:
            self._is_offload_param = self._is_offload_optimizer = False
            self._uses_fsdp2_cpu_offload_policy = True
            offload = CPUOffloadPolicy(pin_memory=True)
        options = {
            "mesh": self.device_mesh,
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=compute_dtype if compute_dtype == CARRIER else None, reduce_dtype=reduce_dtype
            ),
            "offload_policy": offload,
            "reshard_after_forward": self.engine_config.reshard_after_forward,
        }
        state = module.state_dict()
        apply_fsdp2(module, options, self.engine_config)
        fsdp2_load_full_state_dict(module, state, self.device_mesh, offload)
        if self.model_config.enable_activation_offload:
            strategy, checkpointing = self.engine_config.strategy, self.model_config.enable_gradient_checkpointing
            enable_activation_offloading(module, strategy, checkpointing)
        return module

    @staticmethod
    def _device_type() -> str:
        from verl.utils.device import get_device_name

        return get_device_name()


class NVFP4EngineWithLMHead(NVFP4EngineMixin, AdapterEngineMixin, FSDPEngineWithLMHead):
    """The engine of the actor and, with the adapter disabled, of the reference policy."""

    role = "actor"
    task_type = TaskType.CAUSAL_LM

    def _empty_module(self, config, dtype: torch.dtype) -> nn.Module:
        return causal_lm(self.model_config, dtype)
