"""Checks of what an arm cannot do, and of the packages that it needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from omegaconf import DictConfig
from packaging.version import Version

from qerl_verl.config.arms import Arm, get_arm
from qerl_verl.config.keys import Get, get_value
from qerl_verl.config.rules import ACTOR, CRITIC, MODEL, trained_models
from qerl_verl.config.settings import SETTINGS, keys_of_scope

BITSANDBYTES = "0.48.1"
"""The lowest version that vLLM's bitsandbytes layers take (vllm-bnb-plugin 0.0.3,
quantization/utils.py)."""


PLUGIN_END = "0.0.3"
"""The first version of vllm-bnb-plugin that needs a newer vLLM than the versions that QeRL works
with."""


def find_problems(
    config: DictConfig, environment: Mapping[str, str] = os.environ, installed: Callable[[str], str] = version
) -> list[str]:
    """Returns what keeps a run from working in its arm, one sentence each with the key and the fix.

    Args:
        config: the configuration after the rules (:mod:`qerl_verl.config.rules`).
        environment: environment variables of the driver.
        installed: distribution name to version; raises PackageNotFoundError for a missing one.
    """
    arm, get = get_arm(config), partial(get_value, config)
    out = missing_packages(arm, installed, environment)
    if not arm.container:
        out += [p for key in keys_of_scope("packed", "quantization") if (p := _foreign_setting(arm, key, get))]
    elif arm.name == "mxfp4":
        out += [p for key in keys_of_scope("quantization") if (p := _foreign_setting(arm, key, get))]
    if not arm.critic and CRITIC in trained_models(config):
        estimator = get("algorithm.adv_estimator")
        out.append(
            f"algorithm.adv_estimator={estimator}: it needs a critic, which the arm {arm.name} "
            "does not have; use grpo, rloo or another estimator without one, or +qerl=nvfp4"
        )
    if arm.name == "nf4":
        out += _nf4_problems(get)
    return out


def _foreign_setting(arm: Arm, key: str, get: Get) -> str | None:
    """Returns why a setting that was changed from its default has no effect in an arm, or None."""
    row, value = SETTINGS[key], get(key)
    if value in (None, row.default):
        return None
    if row.setting.scope == "quantization":
        return f"{key}={value}: how a model becomes NVFP4, and the arm {arm.name} has another base; remove it"
    return (
        f"{key}={value}: a setting of the packed layers of +qerl=nvfp4 and mxfp4, and the arm "
        f"{arm.name} has none; remove it"
    )


def missing_packages(
    arm: Arm, installed: Callable[[str], str] = version, environment: Mapping[str, str] = os.environ
) -> list[str]:
    """Returns the packages that an arm needs and that are not installed. The nf4 arm needs
    bitsandbytes and vLLM's layers for it, which are a separate plugin since vLLM 0.28.
    """
    if arm.name != "nf4":
        return []

    def found(name: str) -> Version | None:
        try:
            return Version(installed(name))
        except PackageNotFoundError:
            return None

    out, bitsandbytes, vllm, layers = [], found("bitsandbytes"), found("vllm"), found("vllm-bnb-plugin")
    if bitsandbytes is None or bitsandbytes < Version(BITSANDBYTES):
        has = "is not installed" if bitsandbytes is None else f"{bitsandbytes} is installed"
        out.append(f"+qerl=nf4: bitsandbytes {has}; `pip install 'bitsandbytes>={BITSANDBYTES}'` on every node")
    if vllm is None or vllm < Version("0.28.dev0"):
        return out
    if layers is None:
        out.append(
            f"+qerl=nf4: vLLM {vllm} has its bitsandbytes layers in a package of their own, "
            "vllm-bnb-plugin, which is not installed; `pip install "
            f"'vllm-bnb-plugin<{PLUGIN_END}'` on every node"
        )
    elif layers >= Version(PLUGIN_END):
        out.append(
            f"+qerl=nf4: vllm-bnb-plugin {layers} calls what vLLM {vllm} does not have "
            f"(WeightsMapper.get_rename_mapper); `pip install 'vllm-bnb-plugin<{PLUGIN_END}'` on "
            "every node"
        )
    elif "bitsandbytes" not in _allowed_plugins(environment):
        out.append(
            f"+qerl=nf4: VLLM_PLUGINS={environment['VLLM_PLUGINS']} keeps vLLM from loading "
            "vllm-bnb-plugin; unset it or add bitsandbytes to its list"
        )
    return out


def _allowed_plugins(environment: Mapping[str, str]) -> list[str]:
    names = environment.get("VLLM_PLUGINS")
    return ["bitsandbytes"] if names is None else names.split(",")


def _nf4_problems(get: Get) -> list[str]:
    found = {
        "+qerl=nf4: there is no GPU, and vLLM's CPU build does not run bitsandbytes' layers; use another arm, or a GPU": get(
            "trainer.device"
        )
        == "cpu"
    }
    found |= {
        f"{ACTOR}.fsdp_config.{name}=True: bitsandbytes keeps "
        "the scales of its weights where verl's offloading "
        "does not reach them; remove the setting (the NF4 "
        "base takes half a byte a weight)": get(f"{ACTOR}.fsdp_config.{name}")
        for name in ("param_offload", "offload_policy")
    }
    dtype = (get(f"{ACTOR}.fsdp_config.mixed_precision") or {}).get("param_dtype", "bf16")
    found[
        f"{ACTOR}.fsdp_config.mixed_precision.param_dtype={dtype}: the arm nf4 computes in 16 bits; use bf16 or fp16"
    ] = dtype in ("fp32", "float32")
    found[f"{MODEL}.use_fused_kernels=True: not tried with the arm nf4; remove it"] = get(f"{MODEL}.use_fused_kernels")
    return [text for text, applies in found.items() if applies]
