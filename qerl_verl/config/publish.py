"""Writes :mod:`qerl_verl.job` in the driver: the document that a configuration gives to the
processes of its run.

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qerl_verl.config.arms import get_arm
from qerl_verl.config.draft import Draft
from qerl_verl.config.keys import MODEL, ROLLOUT, VARIABLES, get_value
from qerl_verl.config.settings import QeRLSettings
from qerl_verl.job import JOB_ENV, Job, LoraSettings
from qerl_verl.lora.experts import adapts_experts
from qerl_verl.switch import ENGINE_VENDOR


def make_job(config: DictConfig) -> Job:
    """Returns the document of a run, from its configuration after the rules.

    Raises:
        SettingsError: the ``qerl`` node has a problem.
    """
    settings, lora = QeRLSettings.of(config), None
    if get_arm(config).container and settings.rollout.lora == "inline":
        rank, alpha = (get_value(config, f"{MODEL}.{name}") for name in ("lora_rank", "lora_alpha"))
        lora = LoraSettings(rank, alpha, adapts_experts(adapter_targets(config)))
    replay = bool(get_value(config, f"{ROLLOUT}.enable_rollout_routing_replay"))
    return Job(settings, lora, get_value(config, f"{ROLLOUT}.dtype") or "bfloat16", replay=replay)


def adapter_targets(config: DictConfig) -> Any:
    """Returns ``target_modules`` of the adapter that a run starts from, or of a new one."""
    folder = get_value(config, f"{MODEL}.lora_adapter_path")
    if isinstance(folder, str):
        try:
            return json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8")).get("target_modules")
        except (OSError, ValueError):  # reported elsewhere, or on a remote file system
            pass
    return get_value(config, f"{MODEL}.target_modules")


def publish(draft: Draft, job: Job) -> None:
    """Writes the document into Ray's runtime environment and into the rollout's engine settings.

    Args:
        draft: the run's configuration.
    """
    why = "the NVFP4 layers" if get_arm(draft.config).container else "adapters alone are synced"
    for name, value in job.layers.additional_config().items():
        key = f"{ROLLOUT}.engine_kwargs.vllm.additional_config.{name}"
        draft.set(key, value, why)
    variables = {**(draft.get(VARIABLES) or {}), **job.environment()}
    variables["VERL_ENGINE_VENDOR"] = ENGINE_VENDOR
    draft.set(VARIABLES, variables, "every process learns of the switch")


def published(config: DictConfig) -> Job:
    """Returns the document that a configuration carries.

    Raises:
        JobError: the configuration carries none.
    """
    return Job.from_json((get_value(config, VARIABLES) or {}).get(JOB_ENV) or "")


def republish(draft: Draft, **changes: Any) -> None:
    """Replaces attributes of the published :class:`~qerl_verl.job.Job`."""
    publish(draft, dataclasses.replace(published(draft.config), **changes))
