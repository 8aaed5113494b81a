"""Decides whether actor and rollout use one copy of the frozen base (``qerl.base``).

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig

from qerl_verl.config.checks.models import local_architecture
from qerl_verl.config.draft import Draft
from qerl_verl.config.keys import get_value
from qerl_verl.config.publish import republish
from qerl_verl.config.rules import ACTOR, MODEL, ROLLOUT, is_separate
from qerl_verl.job import BaseSharing

LOAD_FORMAT = "qerl_shared"
"""vLLM's ``load_format`` of an engine that uses the actor's base (rollout/shared_base.py)."""

ENGINE = f"{ROLLOUT}.engine_kwargs.vllm"


def find_obstacle(config: DictConfig, environment: Mapping[str, str]) -> str | None:
    """Returns why actor and rollout of a run cannot use one copy of the base, as far as its
    configuration tells, or None.
    """
    if (architecture := local_architecture(config, MODEL)) and not architecture.shares_base:
        return f"one copy of the base has not been tried with {architecture.name}"
    if is_separate(config):
        return "the rollout engines have devices of their own (trainer.v1.trainer_mode=separate_async)"
    for key in ("tensor_model_parallel_size", "data_parallel_size", "pipeline_model_parallel_size"):
        if (get_value(config, f"{ROLLOUT}.{key}") or 1) > 1:
            return f"the rollout's base is divided ({ROLLOUT}.{key}={get_value(config, f'{ROLLOUT}.{key}')})"
    if get_value(config, f"{ROLLOUT}.disaggregation.enabled"):
        return f"prefill and decoding have engines of their own ({ROLLOUT}.disaggregation)"
    kernels = get_value(config, "qerl.kernel") or "auto", get_value(config, "qerl.rollout.kernel") or "auto"
    if "auto" not in kernels and kernels[0] != kernels[1]:
        return f"qerl.kernel={kernels[0]} and qerl.rollout.kernel={kernels[1]} lay out the weights each in its own way"
    if kernels[1] == "marlin":
        return "vLLM's Marlin lays out the weights in its own way (qerl.rollout.kernel=marlin)"
    if get_value(config, "qerl.rollout.lora") == "punica":
        return "one copy of the base has not been tried with vLLM's own LoRA path (qerl.rollout.lora=punica)"
    if get_value(config, f"{ACTOR}.fsdp_config.offload_policy"):
        return f"the actor's base waits in host memory ({ACTOR}.fsdp_config.offload_policy=True)"
    if "MIG-" in environment.get("CUDA_VISIBLE_DEVICES", ""):
        return "CUDA shares no memory between processes on a part of a GPU (MIG)"
    load_format = get_value(config, f"{ENGINE}.load_format") or get_value(config, f"{ROLLOUT}.load_format")
    if load_format not in (None, "auto", "safetensors", "dummy", LOAD_FORMAT):
        return f"the rollout loads the base in a way of its own ({ROLLOUT}.load_format={load_format})"
    return None


def choose_base(setting: str, obstacle: str | None, on_cpu: bool) -> tuple[bool, str]:
    """Returns whether the base is shared, and why.

    Args:
        setting: ``qerl.base``.
        obstacle: see :func:`find_obstacle`.
    """
    if setting == "separate":
        return False, "qerl.base=separate"
    if obstacle:
        return False, obstacle
    if setting == "auto" and not on_cpu:
        return (
            False,
            "qerl.base=auto shares on the CPU alone: on GPUs sharing has not been measured; qerl.base=shared does",
        )
    return True, f"qerl.base={setting}"


def describe_cost(folder: Path, shared: bool) -> str:
    """Returns a sentence on the device memory that the base takes in actor and rollout together.

    Args:
        folder: the packed checkpoint.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    if shared:
        return f"{size:.2f} GiB, in memory once"
    return f"{size:.2f} GiB, in the rollout once more (in host memory or on disk while it sleeps)"


def share_base(draft: Draft) -> None:
    """Changes the settings that one copy of the base requires. The callback adds the job's key and
    the checkpoint.
    """
    for key in (f"{ROLLOUT}.load_format", f"{ENGINE}.load_format"):
        if key == f"{ROLLOUT}.load_format" or draft.get(key) is not None:
            draft.set(key, LOAD_FORMAT, "the rollout maps the actor's base")
    republish(draft, sharing=BaseSharing())
