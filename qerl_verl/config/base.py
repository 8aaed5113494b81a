"""Whether actor and rollout use one copy of the frozen base (``qerl.base``), and what each of them has to know of it.

Importable without torch, verl or vLLM.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from qerl_verl.config.checks.models import local_folder
from qerl_verl.config.keys import get_value, set_value
from qerl_verl.config.rules import ACTOR, MODEL, ROLLOUT, is_separate, rollout_layers
from qerl_verl.nvfp4.architectures import Architecture, UnsupportedArchitecture, get_architecture
from qerl_verl.switch import BASE_ENV

LOAD_FORMAT = "qerl_shared"
"""vLLM's ``load_format`` of an engine that uses the actor's base (rollout/shared_base.py)."""

ENGINE = f"{ROLLOUT}.engine_kwargs.vllm"
VARIABLES = "ray_kwargs.ray_init.runtime_env.env_vars"


@dataclass(frozen=True)
class BaseSharing:
    """What the processes of a job learn through :data:`~qerl_verl.switch.BASE_ENV`.

    Attributes:
        key: of the job: names the owner's socket and opens it.
        required: ``qerl.base=shared``: what cannot be shared ends the run, instead of two copies.
        kernel: ``qerl.rollout.kernel``.
        lora_rank: of the adapter in the rollout's layers; None where vLLM's own LoRA path serves it.
        dtype: ``actor_rollout_ref.rollout.dtype``.
        model: ``actor_rollout_ref.model.path`` after quantization: a critic of the same checkpoint uses its base.
    """

    key: str
    required: bool
    kernel: str
    lora_rank: int | None
    dtype: str
    model: str = ""

    @classmethod
    def of_this_job(cls) -> BaseSharing | None:
        """From this process's environment; None where each process has a copy of its own."""
        text = os.environ.get(BASE_ENV)
        return cls(**json.loads(text)) if text else None

    def environment(self) -> dict[str, str]:
        return {BASE_ENV: json.dumps(asdict(self))}


def find_obstacle(config: DictConfig, environment: Mapping[str, str]) -> str | None:
    """Why actor and rollout of a run cannot use one copy of the base, as far as its configuration tells, or None."""
    if (architecture := _architecture(config)) and not architecture.shares_base:
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


def _architecture(config: DictConfig) -> Architecture | None:
    """Of the actor's model, where it is on this machine and known."""
    folder = local_folder(config, MODEL)
    try:
        return get_architecture(json.loads((folder / "config.json").read_text(encoding="utf-8"))) if folder else None
    except (OSError, ValueError, UnsupportedArchitecture):  # told elsewhere
        return None


def choose_base(setting: str, obstacle: str | None, on_cpu: bool) -> tuple[bool, str]:
    """Whether the base is shared, and why.

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
    """What the base takes of a device's memory in actor and rollout together.

    Args:
        folder: the packed checkpoint.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**30
    if shared:
        return f"{size:.2f} GiB, in memory once"
    return f"{size:.2f} GiB, in the rollout once more (in host memory or on disk while it sleeps)"


def name_model(config: DictConfig) -> None:
    """Tell the job's processes which checkpoint is shared, once its path is known, in place."""
    variables = dict(get_value(config, VARIABLES))
    sharing = replace(BaseSharing(**json.loads(variables[BASE_ENV])), model=get_value(config, f"{MODEL}.path"))
    set_value(config, VARIABLES, variables | sharing.environment(), "the shared checkpoint", lambda line: None)


def share_base(config: DictConfig, required: bool, notify) -> None:
    """Set in a composed configuration what one copy of the base needs, in place.

    Args:
        required: see :class:`BaseSharing`.
        notify: called with one line for each value set.
    """
    set_value(config, f"{ROLLOUT}.load_format", LOAD_FORMAT, "the rollout maps the actor's base", notify)
    if get_value(config, f"{ENGINE}.load_format") is not None:
        set_value(config, f"{ENGINE}.load_format", LOAD_FORMAT, "the rollout maps the actor's base", notify)
    layers = rollout_layers(config)
    sharing = BaseSharing(
        key=secrets.token_hex(16),
        required=required,
        kernel=layers["kernel"],
        lora_rank=None if layers["lora"] is None else layers["lora"]["rank"],
        dtype=get_value(config, f"{ROLLOUT}.dtype"),
    )
    merged = {**(get_value(config, VARIABLES) or {}), **sharing.environment()}
    set_value(config, VARIABLES, merged, "the job's key to the shared base", lambda line: None)
