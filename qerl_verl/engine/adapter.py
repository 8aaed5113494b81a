"""Trains LoRA adapters on a frozen base, in every arm's engine.

verl's FSDP engine (verl/workers/engine/fsdp/transformer_impl.py) calls the methods here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from torch.distributed.tensor import DTensor
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils.device import get_device_id
from verl.utils.fs import copy_to_local
from verl.utils.model import convert_weight_keys
from verl.utils.py_functional import convert_to_regular_types
from verl.utils.torch_dtypes import PrecisionType
from verl.utils.ulysses import slice_input_tensor

from qerl_verl.engine.attention import hand_on_positions
from qerl_verl.engine.checkpoint import AdapterCheckpointMixin
from qerl_verl.engine.routing import FIELD, RoutingReplay, flatten
from qerl_verl.engine.step import StepMixin
from qerl_verl.finite import NonFiniteError, first_nonfinite
from qerl_verl.job import this_job
from qerl_verl.log_lines import say
from qerl_verl.lora.adapter_files import check_loaded, map_names, read_adapter_config, read_tensors
from qerl_verl.lora.experts import stack_experts
from qerl_verl.lora.peft import (
    adaptable_layers,
    draw_adapter,
    linear_names,
    published,
    register_nvfp4,
    tower_of,
)
from qerl_verl.lora.targets import ALL_LINEAR, all_linear, without_tower
from qerl_verl.lora.wire import CONFIG_TENSOR, pack_config
from qerl_verl.nvfp4.architectures import get_architecture


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


class AdapterEngineMixin(StepMixin, AdapterCheckpointMixin):
    """Adds the trained parameters to any base: LoRA adapters in float32 whose initial values come
    from the engine's seed.

    Stands in front of one of verl's FSDP engines, and behind the class that builds the base. Every
    arm uses it, so runs of two arms with the same seed start from the same adapter.

    Raises:
        NonFiniteError: a NaN or Inf in an adapter that is about to be sent or saved
            (:meth:`get_per_tensor_param`, :meth:`save_checkpoint`), or as :class:`StepMixin`.
    """

    task_type: TaskType
    """PEFT's; decides which class wraps the model, and which modules beside the adapters train."""

    new_modules: tuple[str, ...] = ()
    """Modules that the checkpoint does not have."""

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
            self._say(f"dropout: {self.role}, {found} in config.json counts as 0, as in the rollout")
        return super().initialize()

    def _say(self, line: str) -> None:
        """Prints a line to the user, on rank 0 alone."""
        if self.rank == 0:
            say(line)

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
            layers = len(self._replay.layers)
            self._say(
                f"routing: the actor replays the rollout's choice of experts in {layers} layer{'s' * (layers > 1)}"
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
