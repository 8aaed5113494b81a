"""Provides the critic's engine: an NVFP4 base with adapters and a value head."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from peft import (
    TaskType,
)
from torch import nn
from transformers import AutoModelForTokenClassification
from verl.utils.fs import copy_to_local, local_mkdir_safe
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithValueHead

from qerl_verl.checkpoint_errors import reading, writing
from qerl_verl.engine.adapter import AdapterEngineMixin
from qerl_verl.engine.nvfp4 import NVFP4EngineMixin

VALUE_HEAD = "score"
"""The value head's name in transformers' token classification models
(transformers/modeling_layers.py, GenericForTokenClassification): ``[1, hidden_size]`` and a
bias."""


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

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Does nothing, since a critic has no reference. verl's trainer
        leaves the reference policy's ``no_lora_adapter`` in the batch
        (verl/trainer/ppo/v1/trainer_base.py, _compute_ref_log_prob), which would otherwise give
        values without adapter and trained head.
        """
        yield

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
