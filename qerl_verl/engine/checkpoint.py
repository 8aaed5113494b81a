"""Saves and loads an engine's checkpoint: verl's files, and the adapter in PEFT's format beside
them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from qerl_verl.checkpoint_errors import reading, writing
from qerl_verl.engine.offload import wait_for_offload
from qerl_verl.job import this_job
from qerl_verl.lora.experts import split_experts
from qerl_verl.lora.peft import (
    published,
    save_adapter,
)

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


class AdapterCheckpointMixin:
    """Saves what trains, and loads it.

    Stands in front of one of verl's FSDP engines, behind :class:`~qerl_verl.engine.step.StepMixin`
    and what gives it ``get_per_tensor_param``.
    """

    role: str
    """As in verl's metrics: actor or critic."""

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
