"""verl's FSDP2 engines with an NVFP4 base and LoRA adapters
(verl/workers/engine/fsdp/transformer_impl.py).
"""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import init_empty_weights
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor
from transformers import AutoModelForTokenClassification
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.activation_offload import enable_activation_offloading
from verl.utils.device import get_device_id
from verl.utils.fs import copy_to_local, local_mkdir_safe
from verl.utils.fsdp_utils import apply_fsdp2, fsdp2_load_full_state_dict, load_fsdp_model_to_gpu
from verl.utils.model import convert_weight_keys
from verl.utils.py_functional import convert_to_regular_types
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.torch_functional import entropy_from_logits, entropy_from_logits_with_chunking
from verl.utils.ulysses import slice_input_tensor
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from qerl_verl.checkpoint_errors import add_note, reading, writing
from qerl_verl.engine.attention import hand_on_positions
from qerl_verl.engine.compile import compile_layers, unavailable
from qerl_verl.engine.offload import wait_for_offload
from qerl_verl.engine.output_layer import use_logprob_layer
from qerl_verl.engine.recompute import Recompute
from qerl_verl.engine.routing import FIELD, RoutingReplay, flatten
from qerl_verl.engine.shared_base import causal_lm, use_shared_base
from qerl_verl.finite import NonFiniteError, first_nonfinite, gather_first, gradient_norms, named_tensors
from qerl_verl.job import this_job
from qerl_verl.kernels.backends import BACKENDS
from qerl_verl.lora.adapter_files import check_loaded, map_names, read_adapter_config, read_tensors
from qerl_verl.lora.experts import split_experts, stack_experts
from qerl_verl.lora.peft import (
    adaptable_layers,
    draw_adapter,
    linear_names,
    published,
    register_nvfp4,
    save_adapter,
    tower_of,
)
from qerl_verl.lora.targets import ALL_LINEAR, all_linear, without_tower
from qerl_verl.lora.wire import CONFIG_TENSOR, pack_config
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, prepack_linears, swap_linears

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))

CARRIER = torch.float32
"""The dtype as which FSDP2 holds and gathers the packed bytes. Up to PyTorch 2.11 it takes no
integer parameters (torch/distributed/fsdp/_fully_shard/_fsdp_param.py, _init_sharded_param). 16-bit
floating-point types will not do: the ``torch._foreach_copy_`` in front of the all-gather
(_fsdp_collectives.py, all_gather_copy_in) takes their values through float32 on a GPU, and where
the bytes look like a NaN it writes another NaN."""

ADAPTER_FOLDER = "lora_adapter"
"""Folder of a checkpoint's ``actor`` or ``critic`` folder that holds the adapter in PEFT's
format."""

CHECKPOINT_README = """\
This checkpoint holds a LoRA adapter with its optimizer, scheduler and random state. It does not hold the base model.

`{folder}/` is a PEFT adapter of {base}. PEFT and vLLM load it as it is.

For a merged model, `qerl export` adds the adapter to the base that it was trained beside. PEFT adds it to the original:

    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained("{folder}", dtype="bfloat16")
    model.merge_and_unload().save_pretrained("merged")

`python -m verl.model_merger` looks for the base in the checkpoint and fails with "Incomplete Hugging Face model output".
"""
"""What is written beside an actor's or a critic's adapter, for whoever wants a model of it."""

VALUE_HEAD = "score"
"""The value head's name in transformers' token classification models
(transformers/modeling_layers.py, GenericForTokenClassification): ``[1, hidden_size]`` and a
bias."""


def remove_dropout(config) -> dict[str, float]:
    """Sets a model's dropout to 0 before it is built.

    Args:
        config: transformers' configuration; changed in place.

    Returns:
        Name -> value of each setting that was not 0.
    """
    found: dict[str, float] = {}
    for part in (config, config.get_text_config()):
        names = {
            name: value
            for name, value in part.to_dict().items()
            if ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, int | float) and value
        }
        for name in names:
            setattr(part, name, 0.0)
        found |= names
    return found


def require_input_gradients(module: nn.Module) -> None:
    """Makes the decoder's embeddings return tensors that require gradients, so that gradients flow
    through checkpointed layers.

    transformers' own method would also let them flow into a vision tower, where nothing trains.
    """
    tower = tower_of(module)
    if not tower:
        module.enable_input_require_grads()
        return
    module.get_input_embeddings().register_forward_hook(lambda layer, arguments, output: output.requires_grad_(True))
    for layer in module.get_submodule(tower.rstrip(".")).modules():
        if getattr(layer, "gradient_checkpointing", False):
            layer.gradient_checkpointing = False


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
        if self.rank == 0:
            print(
                f"[qerl] kernel: {self.role} NVFP4 linear = {kernel}; attention {config._attn_implementation}",
                flush=True,
            )
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
            if self.rank == 0:
                print(f"[qerl] compile: {self.role}, {said}", flush=True)
        return module

    def _say_recompute(self, text: str) -> None:
        if self.rank == 0:
            print(f"[qerl] recompute: {self.role}, {text}", flush=True)

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


class AdapterEngineMixin:
    """Adds the trained parameters to any base: LoRA adapters in float32 whose initial values come
    from the engine's seed.

    Stands in front of one of verl's FSDP engines, and behind the class that builds the base. Every
    arm uses it, so runs of two arms with the same seed start from the same adapter.

    Raises:
        NonFiniteError: a NaN or Inf in a loss (:meth:`forward_step`), in a gradient norm
            (:meth:`optimizer_step`) or in an adapter that is about to be sent or saved
            (:meth:`get_per_tensor_param`, :meth:`save_checkpoint`).
    """

    role: str
    """As in verl's metrics: actor or critic."""

    task_type: TaskType
    """PEFT's; decides which class wraps the model, and which modules beside the adapters train."""

    new_modules: tuple[str, ...] = ()
    """Modules that the checkpoint does not have."""

    _recompute: Recompute | None = None
    """With ``enable_gradient_checkpointing`` on an NVFP4 base."""

    _replay: RoutingReplay | None = None
    """The replay of the rollout's routing, for an actor whose rollout returns the experts of each
    token.
    """

    def initialize(self):
        """Initializes verl's engine on a base without dropout, since the sampling policy has no
        dropout either.
        """
        if dropped := remove_dropout(self.model_config.hf_config):
            found = ", ".join(f"{name}={value}" for name, value in dropped.items())
            if self.rank == 0:
                print(f"[qerl] dropout: {self.role}, {found} in config.json counts as 0, as in the rollout", flush=True)
        return super().initialize()

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Returns the dtypes of computation and of gradient reduction, read as verl reads them
        (_build_fsdp_module).
        """
        settings = self.engine_config.mixed_precision or {}
        names = settings.get("param_dtype", "bf16"), settings.get("reduce_dtype", "fp32")
        return tuple(PrecisionType.to_dtype(name) for name in names)

    def _patch_forward(self, module: nn.Module, use_fused_kernels: bool) -> None:
        """Applies verl's changes to a model's forward pass, as verl's engine does (_build_module).

        Its changes for packed rows require flash-attn and are left out. One of them replaces the
        attention layers of Qwen2.5-VL by layers that call flash-attn whatever the attention
        implementation is (verl/models/transformers/qwen2_vl.py, qwen2_vl_attn_forward).
        """
        attention = self.model_config.hf_config.get_text_config()._attn_implementation or ""
        apply_monkey_patch(
            model=module,
            use_remove_padding=self.use_remove_padding and attention.startswith("flash_attention"),
            ulysses_sp_size=self.ulysses_sequence_parallel_size,
            use_fused_kernels=use_fused_kernels,
            fused_kernels_backend=(self.model_config.fused_kernel_options or {}).get("impl_backend"),
        )

    def _build_lora_module(self, module: nn.Module) -> nn.Module:
        """Returns the model with PEFT's LoRA layers. Their float32 master weights are cast to 16
        bits for the forward pass.
        """
        require_input_gradients(module)
        if self.role == "actor" and this_job().replay:
            self._replay = RoutingReplay(module, get_architecture(module.config).routers(module.config))
            if self.rank == 0:
                layers = len(self._replay.layers)
                print(
                    f"[qerl] routing: the actor replays the rollout's choice of experts in {layers} layer{'s' * (layers > 1)}",
                    flush=True,
                )
        hand_on_positions(module)
        adapter = self.model_config.lora_adapter_path
        if adapter is not None:
            module = self._load_adapter(module, copy_to_local(adapter, use_shm=self.model_config.use_shm))
        else:
            targets = convert_to_regular_types(self.model_config.target_modules)
            if targets == "all-linear":
                targets = [name for name in linear_names(module) if name not in self.new_modules]
            config = LoraConfig(
                task_type=self.task_type,
                r=self.model_config.lora_rank,
                lora_alpha=self.model_config.lora_alpha,
                target_modules=targets,
                exclude_modules=without_tower(self.model_config.exclude_modules, tower_of(module)),
                bias="none",
            )
            with torch.random.fork_rng(devices=[]):
                module = get_peft_model(module, register_nvfp4(config, module))
            draw_adapter(
                module, self.engine_config.seed
            )  # verl seeds nothing: two runs would begin with other adapters
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return module

    def _load_adapter(self, module: nn.Module, folder: str) -> PeftModel:
        """Returns the model with the complete adapter of a folder in PEFT's format.

        Raises:
            AdapterError: the adapter is not plain LoRA, belongs to another model, or has tensors
                that could not be loaded.
        """
        content = read_adapter_config(folder, heads=("classifier", *self.new_modules) if self.new_modules else ())
        layers = {n: shape for n, shape in adaptable_layers(module).items() if n not in self.new_modules}
        head = {n: tuple(p.shape) for n, p in module.named_parameters() if n.partition(".")[0] in self.new_modules}
        tensors = read_tensors(folder)
        names = map_names({name: tuple(tensor.shape) for name, tensor in tensors.items()}, content, layers, head)
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode, config.init_lora_weights = False, True
        config.exclude_modules = without_tower(config.exclude_modules, tower_of(module))
        if config.target_modules == ALL_LINEAR:
            config.target_modules = set(all_linear(layers))
        # PEFT adds the modules that the task trains, to those that the folder names once more
        config.task_type, config.modules_to_save = self.task_type, None
        # PEFT looks at the base's config.json at every sync, and on the hub for it if the name is
        # none of a folder
        config.base_model_name_or_path = self.model_config.path
        module = get_peft_model(module, register_nvfp4(config, module))
        tensors = stack_experts(tensors)
        set_peft_model_state_dict(module, tensors)
        check_loaded(get_peft_model_state_dict(module), tensors)
        return module

    def _build_optimizer(self, module: nn.Module):
        """Builds the optimizer of the trained parameters alone, so neither its state nor its
        checkpoint contains the base.
        """
        from verl.workers.config.optimizer import build_optimizer

        return build_optimizer([p for p in module.parameters() if p.requires_grad], self.optimizer_config)

    def _at_step(self, after: bool = False) -> str:
        """Returns the role and the step, for messages.

        verl advances the scheduler once per training step, at its end, and restores it on resume.
        With ``separate_async`` verl advances it once per update, so the number counts updates.

        Args:
            after: whether the step's updates are over.
        """
        scheduler = getattr(self, "lr_scheduler", None)
        return self.role if scheduler is None else f"{self.role}, step {scheduler.last_epoch + (not after)}"

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disables the adapter as verl does, and the replay of the routing too: the reference
        policy chooses its experts by itself.
        """
        with super().disable_adapter(), nullcontext() if self._replay is None else self._replay.paused():
            yield

    def prepare_model_inputs(self, micro_batch):
        """Prepares the inputs as verl does, and brings the rollout's choices of experts into the
        same order.

        Raises:
            ValueError: the batch has no choices of experts, or those of another model.
        """
        inputs, args = super().prepare_model_inputs(micro_batch)
        if self._replay is not None:
            recorded, rows = micro_batch.get(FIELD, None), inputs["input_ids"]
            if recorded is not None:
                packed = inputs["attention_mask"] is None
                recorded = flatten(recorded, None if packed else rows.shape[1])
                if packed and (padding := args["pad_size"]):
                    recorded = torch.cat([recorded, recorded.new_zeros(padding, *recorded.shape[1:])])
                if packed and self.use_ulysses_sp:
                    recorded = slice_input_tensor(recorded, dim=0, padding=False)
            self._replay.begin(recorded, rows.numel())
        return inputs, args

    def forward_step(self, micro_batch, loss_function, forward_only):
        """Runs verl's forward pass of one micro-batch, and ends the run at a loss that is not
        finite.

        Raises:
            NonFiniteError: naming the loss and the first tensor with a NaN or Inf among the model's
                output and its input.
        """
        if self._recompute and not forward_only:
            self._recompute.begin()
        loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if not math.isfinite(output["loss"]):
            tensors = named_tensors(("output", output["model_output"]), ("batch", micro_batch))
            name = first_nonfinite(tensors)
            cause = f"; the first tensor that is not finite is {name}" if name else "; what went into it is finite"
            raise NonFiniteError(f"[qerl] {self._at_step()}: the loss is {output['loss']}{cause}. The run stops here.")
        return loss, output

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        """Runs verl's forward and backward passes of a batch.

        Raises:
            torch.OutOfMemoryError: with a note that names ``qerl.recompute``, where that can help.
        """
        try:
            output = super().forward_backward_batch(data, loss_function, forward_only)
        except torch.OutOfMemoryError as error:
            if self._recompute and not forward_only and self._recompute.keeps:
                add_note(
                    error,
                    f"[qerl] {self._at_step()}: layers keep their products for the backward pass; qerl.recompute=full keeps "
                    "none, at the price of computing them twice.",
                )
            raise
        if self._recompute and not forward_only:
            self._recompute.observe()
        return output

    def optimizer_step(self) -> float:
        """Clips the gradients and updates the parameters as verl does. Where verl skips an update
        whose gradient norm is not finite, the run ends.

        With float16's loss scaling, such updates are part of the method and are skipped as in verl.

        Returns:
            The norm of the gradients before clipping.

        Raises:
            NonFiniteError: on every rank, naming the first parameter whose gradient norm is not
                finite. Parameters are as they were before the step.
        """
        names, norms = gradient_norms(self.module)
        grad_norm = super().optimizer_step()
        if self.scaler is None and not math.isfinite(grad_norm):
            bad = [] if norms is None else [n for n, finite in zip(names, norms.isfinite().tolist()) if not finite]
            name = gather_first(bad[0] if bad else None) or "no single one of them"
            raise NonFiniteError(
                f"[qerl] {self._at_step()}: the gradient norm is {grad_norm}; not finite: gradient of {name}. "
                "The run stops here, the weights are those before the step."
            )
        return grad_norm

    def get_per_tensor_param(self, layered_summon: bool = False, base_sync_done: bool = False, **kwargs):
        """Returns the adapter for the rollout, as full float32 tensors, and its configuration. The
        base is never sent.

        The experts of a layer have four tensors, see :mod:`qerl_verl.lora.experts`.

        Args:
            base_sync_done: False where verl wants a whole model for one of its checkpoint engines
                and drops the configuration (verl/workers/engine_workers.py, update_weights). Then
                the last tensor is the configuration, see :mod:`qerl_verl.lora.wire`, and all
                tensors are on the engine's device; otherwise they may be on the host.

        Raises:
            NonFiniteError: naming the first tensor of the adapter with a NaN or Inf.
        """
        if layered_summon or self._is_offload_param or self._uses_fsdp2_cpu_offload_policy:
            tensors, _ = super().get_per_tensor_param(layered_summon=layered_summon, base_sync_done=True, **kwargs)
            tensors = list(tensors)
        else:  # verl would copy each tensor to the host, and its sender back to the device
            state = convert_weight_keys(get_peft_model_state_dict(self.module), self.module)
            tensors = [(n, t.full_tensor() if isinstance(t, DTensor) else t) for n, t in state.items()]
            tensors = [(name, tensor.detach()) for name, tensor in tensors]
        config = published(self.module.peft_config["default"]).to_dict()
        if name := first_nonfinite(tensors):
            raise NonFiniteError(
                f"[qerl] {self._at_step(after=True)}: {name} is not finite; it is neither sent nor saved."
            )
        if not base_sync_done:
            # last: a float32 tensor behind an odd number of bytes could not be viewed as one
            tensors = [*tensors, (CONFIG_TENSOR, pack_config(config))]
            tensors = [(name, tensor.to(get_device_id())) for name, tensor in tensors]
        return tensors, config

    def save_checkpoint(self, local_path: str, hdfs_path=None, global_step: int = 0, max_ckpt_to_keep=None, **kwargs):
        """Saves verl's checkpoint (adapter, optimizer, scheduler, random state), and beside it the
        adapter in PEFT's format.

        Raises:
            NonFiniteError: the adapter holds a NaN or Inf; nothing is written.
            CheckpointError: the disk is full, or the folder cannot be written to.
        """
        tensors, _ = self.get_per_tensor_param(base_sync_done=True)
        wait_for_offload()  # what is saved of an offloaded optimizer is read on the host
        with writing(local_path, self._at_step(after=True)):
            super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)
            if self.rank == 0:
                base = this_job().sources.get(self.role, self.model_config.path)
                config, tensors = published(self.module.peft_config["default"]), split_experts(dict(tensors))
                save_adapter(os.path.join(local_path, ADAPTER_FOLDER), tensors, config, base_model=base)
                Path(local_path, "README.md").write_text(CHECKPOINT_README.format(base=base, folder=ADAPTER_FOLDER))
        torch.distributed.barrier()

    def load_checkpoint(self, local_path: str, hdfs_path=None, del_local_after_load: bool = True, **kwargs):
        """Loads verl's checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged, or another number of ranks saved it.
        """
        with reading(local_path, self.role, torch.distributed.get_world_size()):
            super().load_checkpoint(local_path, hdfs_path, del_local_after_load, **kwargs)


class NVFP4EngineWithLMHead(NVFP4EngineMixin, AdapterEngineMixin, FSDPEngineWithLMHead):
    """The engine of the actor and, with the adapter disabled, of the reference policy."""

    role = "actor"
    task_type = TaskType.CAUSAL_LM

    def _empty_module(self, config, dtype: torch.dtype) -> nn.Module:
        return causal_lm(self.model_config, dtype)


class NVFP4EngineWithValueHead(NVFP4EngineMixin, AdapterEngineMixin, FSDPEngineWithValueHead):
    """The engine of the critic (verl/workers/engine/fsdp/transformer_impl.py,
    FSDPEngineWithValueHead).

    The model is transformers' token classification model with one label, as verl builds it
    (verl/utils/model.py, load_valuehead_model). The value head is in float32 and trains beside the
    adapters as one of PEFT's ``modules_to_save``, so it is part of the saved adapter. verl's
    ``save_lora_only`` knows only LoRA tensors, so in a checkpoint each rank writes its shard of the
    head to a file of its own.
    """

    role = "critic"
    task_type = TaskType.TOKEN_CLS
    new_modules = (VALUE_HEAD,)

    def _empty_module(self, config, dtype: torch.dtype) -> nn.Module:
        config.num_labels, config.classifier_dropout = 1, 0.0
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = AutoModelForTokenClassification.from_config(
                config, dtype=dtype, trust_remote_code=self.model_config.trust_remote_code
            )
        head = getattr(module, VALUE_HEAD).float()
        if self.rank == 0:
            # as transformers initializes it, but from the engine's seed
            head.to_empty(device="cpu")
            generator = torch.Generator().manual_seed(self.engine_config.seed)
            nn.init.normal_(head.weight, std=config.initializer_range, generator=generator)
            nn.init.zeros_(head.bias)
        return module

    def disable_adapter(self) -> AbstractContextManager:
        """Returns a context that does nothing, since a critic has no reference. verl's trainer
        leaves the reference policy's ``no_lora_adapter`` in the batch
        (verl/trainer/ppo/v1/trainer_base.py, _compute_ref_log_prob), which would otherwise give
        values without adapter and trained head.
        """
        return nullcontext()

    def _head_file(self, folder: str) -> str:
        world_size = torch.distributed.get_world_size()
        return os.path.join(folder, f"value_head_world_size_{world_size}_rank_{self.rank}.pt")

    def _on_device(self) -> None:
        if self._is_offload_param:  # verl's own save and load move it back
            load_fsdp_model_to_gpu(self.module)

    def save_checkpoint(self, local_path: str, hdfs_path=None, global_step: int = 0, max_ckpt_to_keep=None, **kwargs):
        """Saves the actor's files, and ``value_head_world_size_W_rank_R.pt``, this rank's float32
        shards.
        """
        super().save_checkpoint(local_path, hdfs_path, global_step, max_ckpt_to_keep, **kwargs)
        if self.checkpoint_manager.should_save_model:
            trained = {n for n, p in self.module.named_parameters() if p.requires_grad and "lora_" not in n}
            self._on_device()
            state = {n: p for n, p in self.module.state_dict().items() if n in trained}
            with writing(local_path, self._at_step(after=True)):
                torch.save(state, self._head_file(local_mkdir_safe(local_path)))
            self.to("cpu", model=self._is_offload_param, optimizer=False, grad=False)
        torch.distributed.barrier()

    def load_checkpoint(self, local_path: str, hdfs_path=None, del_local_after_load: bool = True, **kwargs):
        """Loads verl's checkpoint and the value head.

        Raises:
            CheckpointError: as for the actor, or the head does not fit this model.
        """
        if self.checkpoint_manager.should_load_model and local_path is not None:
            self._on_device()
            with reading(local_path, self.role, torch.distributed.get_world_size()):
                state = torch.load(copy_to_local(self._head_file(local_path)), weights_only=False)
                result = self.module.load_state_dict(state, strict=False)
                if not state or result.unexpected_keys:
                    raise ValueError(
                        f"{self._head_file(local_path)}: unexpected {result.unexpected_keys or 'empty file'}"
                    )
        super().load_checkpoint(local_path, hdfs_path, del_local_after_load, **kwargs)
