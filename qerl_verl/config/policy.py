"""Lists the settings that define a run's policy beside its weights, and finds their changes between
save and resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig

from qerl_verl.config.keys import get_value
from qerl_verl.config.rules import ROLLOUT, trained_models
from qerl_verl.config.settings import SETTINGS

NOISE = "qerl.aqn"


def describe_policy(config: DictConfig, adapters: Mapping[str, dict] | None = None) -> dict[str, Any]:
    """Returns setting -> value, in JSON's types: rank, alpha, rsLoRA and layers of each adapter,
    the noise, the base's format and the sampling dtype. Unknown values are left out, for example
    the layers of a model that has not been downloaded.

    Args:
        config: the configuration after the rules (:mod:`qerl_verl.config.rules`).
        adapters: see :class:`~qerl_verl.config.plan.Plan`.
    """
    out: dict[str, Any] = {}
    for model in trained_models(config):
        adapter = (adapters or {}).get(model)
        out |= {f"{model}.{name}": get_value(config, f"{model}.{name}") for name in ("lora_rank", "lora_alpha")}
        if adapter or get_value(config, f"{model}.lora_adapter_path") is None:
            out[f"{model}.use_rslora"] = bool((adapter or {}).get("use_rslora"))
            if layers := _adapted_layers(config, model, adapter):
                out[f"{model}.target_modules"] = layers
    out[f"{ROLLOUT}.dtype"] = get_value(config, f"{ROLLOUT}.dtype")
    for key in (key for key, row in SETTINGS.items() if row.setting.defines_policy):
        group, _, name = key.rpartition(".")
        if name in (get_value(config, group) or {}):
            out[key] = get_value(config, key)
    return out


def find_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns the differences, one sentence each with both values and the fix. A setting that is
    missing on either side is not compared.

    Args:
        then: the settings that a checkpoint recorded.
        now: the result of :func:`describe_policy` for the run that resumes from it.
    """
    noiseless = then.get(f"{NOISE}.enable") is False and now.get(f"{NOISE}.enable") is False
    out = []
    for key in sorted(then.keys() & now.keys()):
        if then[key] == now[key] or (noiseless and key.startswith(f"{NOISE}.")):
            continue
        model, _, name = key.rpartition(".")
        if name == "use_rslora":
            fix = f"give the lora_adapter_path that the first run had, or none ({model}.lora_adapter_path)"
        else:
            value = f"[{','.join(then[key])}]" if isinstance(then[key], list) else then[key]
            fix = f"use +qerl={value}" if key == "qerl.arm" else f"set {key}={'null' if value is None else value}"
        out.append(f"{key} was {then[key]} and is {now[key]}; {fix}")
    return out


def _adapted_layers(config: DictConfig, model: str, adapter: dict | None) -> list[str]:
    """Returns the layers with an adapter: their last names if these identify them, else their full
    names; empty if unknown.
    """
    from qerl_verl.config.adapters import adapted_layers
    from qerl_verl.config.checks.models import local_folder
    from qerl_verl.lora.targets import last_names, matched_layers
    from qerl_verl.nvfp4.errors import CheckpointError
    from qerl_verl.nvfp4.model_shapes import adaptable_shapes

    folder = local_folder(config, model)
    try:
        layers = adaptable_shapes(folder) if folder else {}
        adapted = adapted_layers(config, model, layers, adapter) if layers else set()
    except (CheckpointError, ValueError, TypeError):  # reported by the checks of models and adapters
        return []
    names = sorted(last_names(adapted))
    return names if adapted and matched_layers(layers, names) == adapted else sorted(adapted)
