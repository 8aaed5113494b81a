"""What the switch sets in verl's configuration. What it refuses stands in :mod:`qerl_verl.config.checks`.

Two kinds of rules, applied in the driver before Ray starts:

- :data:`DEFAULTS` and :data:`CPU_DEFAULTS` replace a value that is still verl's own default. A value from the command line
  or from a recipe stays.
- :func:`force` sets what QeRL cannot run without, whoever set the key before.

Importable without torch, verl or vLLM.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from packaging.version import Version

from qerl_verl.config.arms import get_arm
from qerl_verl.config.keys import ACTOR, CRITIC, MODEL, ROLLOUT, VARIABLES, get_value, is_written, set_value
from qerl_verl.config.publish import make_job, publish
from qerl_verl.config.reserved import reserved
from qerl_verl.platform.compilers import missing_compiler
from qerl_verl.platform.cpu_features import missing_bfloat16

WORKER_EXTENSION = "qerl_verl.rollout.worker.QeRLWorkerExtension"
TRAINER_MODES = {
    "sync": "qerl_sync",
    "colocate_async": "qerl_colocate_async",
    "separate_async": "qerl_separate_async",
}
"""verl's trainer modes that run with QeRL, and the names our trainers are registered under."""

PACKED_ATTENTION = "qerl_packed"
"""The attention of engine/attention.py in transformers' registry."""

TRANSPORT = "qerl"
"""The checkpoint engine of rollout/transport.py in verl's registry."""


@dataclass(frozen=True)
class Default:
    """``key`` becomes ``value`` where it still has verl's ``stock`` value (None: also where it is absent)."""

    key: str
    stock: Any
    value: Any
    why: str


DEFAULTS = (
    Default(f"{MODEL}.lora_rank", 0, 32, "QeRL trains LoRA adapters; rank 32 is the paper's"),
    Default(f"{MODEL}.lora_alpha", 16, 32, "scaling 1 at rank 32"),
    Default(f"{ROLLOUT}.name", None, "vllm", "the rollout runs in vLLM"),
    Default("algorithm.rollout_correction.rollout_is", None, "token", "samples come from the noised policy: truncated "
            "importance sampling, token by token"),
)  # fmt: skip

CRITIC_DEFAULTS = (
    Default(f"{CRITIC}.lora_rank", 0, 32, "the critic's base is NVFP4 too: it trains LoRA adapters and the value head"),
    Default(f"{CRITIC}.lora_alpha", 16, 32, "scaling 1 at rank 32"),
)

SEPARATE_DEFAULTS = (
    Default(f"{ROLLOUT}.checkpoint_engine.backend", "naive", TRANSPORT, "the adapter goes to engines of their own over TCP"),
    Default(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes", 2048, 256, "an adapter, not a model"),
)  # fmt: skip
"""With ``trainer.v1.trainer_mode=separate_async``."""

COMPILATION = '{"inductor_compile_config": {"triton.enable_pdl": true}}'
"""vLLM's ``compilation_config``: TorchInductor's kernels are launched while the kernel before them ends (programmatic dependent
launch). Each waits before it reads what its predecessor writes (torch/_inductor/codegen/triton.py, _handle_pdl_before_access) and lets
its successor start only then; the Hopper kernels, which let theirs start at once, end after their own wait. So nothing that a launch
reads is unfinished."""

BF16_DEFAULTS = (
    Default(f"{ACTOR}.fsdp_config.model_dtype", "fp32", "bf16", "the base is frozen, so it is held in 16 bits; the adapters "
            "train in float32"),
)  # fmt: skip

NF4_DEFAULTS = (
    Default(f"{ROLLOUT}.engine_kwargs.vllm.quantization", None, "bitsandbytes", "vLLM quantizes the base to NF4 when it loads it"),
)  # fmt: skip

CONTAINER_GPU_DEFAULTS = (
    Default(f"{ROLLOUT}.engine_kwargs.vllm.compilation_config", None, COMPILATION, "kernels start while the one before ends"),
)  # fmt: skip

UNCOMPUTED = {
    "remax": "the reward of a greedy response (reward_baselines)",
    "optimal_token_baseline": "sum_pi_squared",
    "tir_optimal_token_baseline": "sum_pi_squared",
    "gdpo": "the attention mask that splits the reward into its parts",
}
"""Estimators that verl 0.9.1 itself cannot run in its V1 trainer, and what it would have to compute (trainer/ppo/v1,
trainer_base.py, _compute_advantage)."""

CPU_DEFAULTS = (
    Default("trainer.n_gpus_per_node", 8, 1, "one slot on the CPU"),
    Default(f"{ROLLOUT}.tensor_model_parallel_size", 2, 1, "one slot on the CPU"),
    Default(f"{ROLLOUT}.enforce_eager", False, True, "no CUDA graphs on the CPU"),
    Default(f"{ROLLOUT}.free_cache_engine", True, False, "vLLM cannot sleep on the CPU"),
    Default(f"{ROLLOUT}.enable_sleep_mode", None, False, "vLLM cannot sleep on the CPU"),
    Default(f"{ROLLOUT}.agent.num_workers", 8, 1, "few cores"),
    Default(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes", 2048, 64, "shared memory is main memory"),
    Default(f"{ROLLOUT}.max_num_batched_tokens", 8192, 2048, "few cores"),
    Default("reward.num_workers", 8, 1, "few cores"),
    Default("data.dataloader_num_workers", 8, 0, "few cores"),
    Default("transfer_queue.backend.SimpleStorage.num_data_storage_units", 8, 1, "few cores"),
    Default(f"{ACTOR}.use_torch_compile", True, False, "compiling costs more than it saves at this size"),
    Default(f"{ACTOR}.fsdp_config.use_torch_compile", True, False, "compiling costs more than it saves at this size"),
    Default("actor_rollout_ref.ref.fsdp_config.use_torch_compile", True, False, "as above"),
    Default("critic.fsdp.use_torch_compile", True, False, "as above"),
)

SEPARATE_CPU_DEFAULTS = (Default(f"{ROLLOUT}.nnodes", 0, 1, "one slot on the CPU for a rollout engine of its own"),)

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def apply_rules(
    config: DictConfig,
    user_keys: set[str],
    on_cpu: bool,
    notify: Callable[[str], None],
    starts_ray: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Apply defaults and requirements to a composed configuration, in place.

    Args:
        config: verl's configuration with the ``qerl`` node.
        user_keys: dotted keys that the user set on the command line; they are left alone even at verl's default.
        on_cpu: whether the run takes place on the CPU platform.
        notify: called with one line for each value set.
        starts_ray: whether the run starts Ray; False where it joins a cluster, which has declared its own resources.
        environment: the driver's environment variables.
    """
    models = trained_models(config)
    defaults = DEFAULTS + (CRITIC_DEFAULTS if CRITIC in models else ())
    arm = get_arm(config)
    defaults += _attention_defaults(models, on_cpu, arm.name != "nf4") + (CPU_DEFAULTS if on_cpu else ())
    if on_cpu and arm.name != "nf4":  # bitsandbytes' layers compute in bfloat16 in the rollout (vllm_bnb_plugin)
        defaults += _compute_dtype_defaults(config, models, user_keys, environment)
    if not on_cpu:
        defaults += _helper_defaults(config)
    if arm.container and not on_cpu:
        defaults += CONTAINER_GPU_DEFAULTS
    defaults += {"bf16": BF16_DEFAULTS, "nf4": NF4_DEFAULTS}.get(arm.name, ())
    if is_separate(config):
        defaults += SEPARATE_DEFAULTS + (SEPARATE_CPU_DEFAULTS if on_cpu else ())
    for model in models:
        if f"{model}.lora_rank" in user_keys or OmegaConf.select(config, f"{model}.lora_rank") != 0:
            defaults = tuple(d for d in defaults if d.key != f"{model}.lora_alpha")
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"):
        defaults = tuple(d for d in defaults if d.key != "algorithm.rollout_correction.rollout_is")
    with open_dict(config):
        engine_key = f"{ACTOR}.fsdp_config.use_torch_compile"
        if get_value(config, f"{ACTOR}.use_torch_compile") is False and engine_key not in user_keys:
            # verl's engine reads this one alone (workers/engine/fsdp/transformer_impl.py)
            set_value(config, engine_key, False, f"as {ACTOR}.use_torch_compile", notify)
        for rule in defaults:
            if not is_written(rule.key, user_keys) and get_value(config, rule.key) == rule.stock:
                set_value(config, rule.key, rule.value, rule.why, notify)
        force(config, on_cpu, notify, starts_ray, environment)


def trained_models(config: DictConfig) -> tuple[str, ...]:
    """Keys of the models that a run trains: the actor's, and with a critic (verl/trainer/ppo/utils.py, need_critic) its."""
    critic = get_value(config, "critic.enable")
    if critic is None:
        critic = get_value(config, "algorithm.adv_estimator") == "gae"
    return (MODEL, CRITIC) if critic else (MODEL,)


def is_separate(config: DictConfig) -> bool:
    """Whether engines of their own sample, before or after :func:`force`."""
    return get_value(config, "trainer.v1.trainer_mode") in ("separate_async", TRAINER_MODES["separate_async"])


VERLS_HELPERS = 8
"""Processes of each kind that verl starts beside the engines, whatever the size of the run."""

HELPERS = {
    f"{ROLLOUT}.agent.num_workers": 64,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 64,
    "reward.num_workers": 16,
}
"""Key of a kind of helper process, and how many sequences of a step keep one busy. A reward may be
slow Python code that holds the interpreter's lock, so fewer sequences share a process."""


def _helper_defaults(config: DictConfig) -> tuple[Default, ...]:
    """Fewer helper processes where a step has few sequences: each imports verl before it can work,
    which takes 3 to 8 CPU seconds (docs/performance-start.md). Agents with tools keep verl's."""
    prompts, n = get_value(config, "data.train_batch_size"), get_value(config, f"{ROLLOUT}.n")
    if not prompts or not n or get_value(config, f"{ROLLOUT}.multi_turn.enable"):
        return ()
    why = f"{prompts * n} sequences a step"
    counts = {key: min(VERLS_HELPERS, -(-prompts * n // share)) for key, share in HELPERS.items()}
    return tuple(Default(key, VERLS_HELPERS, count, why) for key, count in counts.items())


def _attention_defaults(models: tuple[str, ...], on_cpu: bool, own_output_layer: bool) -> tuple[Default, ...]:
    """What takes the place of flash-attn where it is not to be had.

    verl's default for attention is flash_attention_2, and without flash-attn's cross entropy verl computes
    log-probabilities one row after the other.

    Args:
        own_output_layer: whether the actor's engine has engine/output_layer.py.
    """
    if has_flash_attention() and not on_cpu:
        return ()
    attention, why = "sdpa" if on_cpu else PACKED_ATTENTION, "flash-attn is not installed"
    found = [Default(f"{model}.override_config.attn_implementation", None, attention, why) for model in models]
    if own_output_layer and not on_cpu:
        found.append(
            Default(f"{MODEL}.use_fused_kernels", False, True, f"log-probabilities in chunks of tokens: {why}")
        )
    return tuple(found)


def has_flash_attention() -> bool:
    """Whether flash_attention_2 can be used, as transformers decides it (is_flash_attn_2_available).

    Its answer is no where no GPU is visible, for example on a login node or the head of a cluster. There the package
    alone is looked at, since the workers have the same; other packages bring a folder ``flash_attn`` too.
    """
    import torch
    from transformers.utils import import_utils

    if torch.cuda.is_available():
        return import_utils.is_flash_attn_2_available()
    try:
        installed = Version(version("flash-attn"))
    except PackageNotFoundError:
        return False
    return importlib.util.find_spec("flash_attn") is not None and installed >= OLDEST_FLASH_ATTENTION


OLDEST_FLASH_ATTENTION = Version("2.3.3")
"""What transformers asks for."""


def _compute_dtype_defaults(
    config: DictConfig, models: tuple[str, ...], user_keys: set[str], environment: Mapping[str, str]
) -> tuple[Default, ...]:
    """float32 where the CPU has no bfloat16 arithmetic, in rollout and actor alike, so that both compute one policy.

    Where the user chose the dtype of either, both are left alone.
    """
    reason = missing_bfloat16(environment)
    if reason is None:
        return ()
    why = f"{reason}, float32 is faster"
    float32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    policy: tuple[Default, ...] = (
        Default(f"{ROLLOUT}.dtype", "bfloat16", "float32", why),
        Default(f"{ACTOR}.fsdp_config.mixed_precision", None, float32, why),
    )
    if any(is_written(rule.key, user_keys) or get_value(config, rule.key) != rule.stock for rule in policy):
        policy = ()
    critic = (Default("critic.fsdp.mixed_precision", None, float32, why),) if CRITIC in models else ()
    return policy + critic


def force(
    config: DictConfig,
    on_cpu: bool,
    notify: Callable[[str], None],
    starts_ray: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Set what QeRL cannot run without. Where that replaces a choice of the user's, ``notify`` says so."""
    arm = get_arm(config)
    for role in (ACTOR, "actor_rollout_ref.ref", "critic"):
        for key in (f"{role}.strategy", f"{role}.fsdp_config.strategy", f"{role}.fsdp.strategy"):
            if get_value(config, key) == "fsdp":
                why = "packed weights are sharded by FSDP2" if arm.container else "as in every arm"
                set_value(config, key, "fsdp2", why, notify)
    if get_value(config, f"{ROLLOUT}.load_format") == "dummy" or arm.load_format != "safetensors":
        set_value(
            config, f"{ROLLOUT}.load_format", arm.load_format, "the frozen base is read from disk, not synced", notify
        )
    if get_value(config, f"{ROLLOUT}.engine_kwargs.vllm") is None:
        set_value(config, f"{ROLLOUT}.engine_kwargs.vllm", {}, "room for the worker extension", notify)
    extension = f"{ROLLOUT}.engine_kwargs.vllm.worker_extension_cls"
    if get_value(config, extension) is None:
        set_value(config, extension, WORKER_EXTENSION, "the noise in the engine", notify)
    for model in trained_models(config):
        if get_value(config, f"{model}.use_liger") and arm.name != "bf16":
            why = f"{arm.base} models run without Liger"
            if arm.container:
                why += "; with use_torch_compile, TorchInductor compiles norms and activation functions"
            set_value(config, f"{model}.use_liger", False, why, notify)
    for checkpoint in (f"{ACTOR}.checkpoint", "critic.checkpoint"):
        if get_value(config, checkpoint) is not None:
            set_value(config, f"{checkpoint}.save_lora_only", True, "the base is frozen", notify)
        contents = get_value(config, f"{checkpoint}.save_contents") or []
        if "hf_model" in contents:
            why = "a checkpoint holds no base to write a model from; `qerl export` writes one that is merged"
            kept = [part for part in contents if part != "hf_model"]
            set_value(config, f"{checkpoint}.save_contents", kept, why, notify)
    mode = get_value(config, "trainer.v1.trainer_mode")
    if mode in TRAINER_MODES:
        set_value(
            config, "trainer.v1.trainer_mode", TRAINER_MODES[mode], "verl's trainer with the noise schedule", notify
        )
    variables = {}
    if on_cpu:
        variables |= cpu_environment(environment, notify)
        slots = get_value(config, "trainer.n_gpus_per_node")
        if is_separate(config):
            slots += get_value(config, f"{ROLLOUT}.nnodes") * get_value(config, f"{ROLLOUT}.n_gpus_per_node")
        set_value(config, "trainer.device", "cpu", "no GPU", notify)
        if starts_ray:
            set_value(config, "ray_kwargs.ray_init.num_gpus", slots, "slots for workers, not GPUs", notify)
            if get_value(config, "ray_kwargs.ray_init.num_cpus") is None:
                cpus = max(8 + 8 * slots, reserved(partial(get_value, config)).cpus)
                set_value(config, "ray_kwargs.ray_init.num_cpus", cpus, "verl reserves logical CPUs", notify)
            if get_value(config, "ray_kwargs.ray_init.include_dashboard") is None:
                set_value(config, "ray_kwargs.ray_init.include_dashboard", False, "a faster start", notify)
    if variables:
        merged = {**variables, **(get_value(config, VARIABLES) or {})}
        set_value(config, VARIABLES, merged, "the CPU platform", notify)
    publish(config, make_job(config), notify)


def cpu_environment(environment: Mapping[str, str], notify: Callable[[str], None]) -> dict[str, str]:
    """Environment variables of the processes that run vLLM's CPU engine.

    Args:
        environment: the caller's; what it sets stays, as far as vLLM can run with it.
        notify: called with one line for each variable that changes how the engine computes.
    """
    variables = {name: environment.get(name, value) for name, value in CPU_ENVIRONMENT.items()}
    if reason := missing_compiler("cpu"):
        # vLLM compiles its sampling on a CPU, also with enforce_eager (v1/sample/ops/topk_topp_sampler.py, forward_cpu)
        variables["TORCH_COMPILE_DISABLE"] = "1"
        notify(f"TORCH_COMPILE_DISABLE=1, nothing is compiled: {reason}")
    if environment.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))) == "1":
        # vLLM 0.28, also without QeRL: "double free or corruption" once a batch mixes prefill and decoding
        variables["OMP_NUM_THREADS"] = "2"
        notify("OMP_NUM_THREADS=2 in the job's processes: vLLM's CPU engine corrupts its memory on one thread")
    return variables
