"""What the switch sets in verl's configuration, and what it refuses.

Three kinds of rules, applied in the driver before Ray starts:

- :data:`DEFAULTS` and :data:`CPU_DEFAULTS` replace a value that is still verl's own default. A value from the command line
  or from a recipe stays.
- :func:`force` sets what QeRL cannot run without, whoever set the key before.
- :func:`find_problems` names combinations that cannot work, each with its key and the cure.

Importable without torch, verl or vLLM.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from qerl_verl.config.settings import RolloutSettings
from qerl_verl.platform.compilers import missing_compiler
from qerl_verl.switch import ENGINE_VENDOR, KERNEL_ENV, RECOMPUTE_ENV, SWITCH_ENV

WORKER_EXTENSION = "qerl_verl.rollout.worker.QeRLWorkerExtension"
TRAINER_MODES = {
    "sync": "qerl_sync",
    "colocate_async": "qerl_colocate_async",
    "separate_async": "qerl_separate_async",
}
"""verl's trainer modes that run with QeRL, and the names our trainers are registered under."""

TRANSPORT = "qerl"
"""The checkpoint engine of rollout/transport.py in verl's registry."""

MODEL = "actor_rollout_ref.model"
CRITIC = "critic.model"
ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"


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
    Default(f"{ROLLOUT}.name", None, "vllm", "the NVFP4 rollout runs in vLLM"),
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

GPU_DEFAULTS = (
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


def apply_rules(config: DictConfig, user_keys: set[str], on_cpu: bool, notify: Callable[[str], None]) -> None:
    """Apply defaults and requirements to a composed configuration, in place.

    Args:
        config: verl's configuration with the ``qerl`` node.
        user_keys: dotted keys that the user set on the command line; they are left alone even at verl's default.
        on_cpu: whether the run takes place on the CPU platform.
        notify: called with one line for each value set.
    """
    models = trained_models(config)
    defaults = DEFAULTS + (CRITIC_DEFAULTS if CRITIC in models else ())
    defaults += _attention_defaults(models) + (CPU_DEFAULTS if on_cpu else GPU_DEFAULTS)
    if _is_separate(config):
        defaults += SEPARATE_DEFAULTS + (SEPARATE_CPU_DEFAULTS if on_cpu else ())
    for model in models:
        if f"{model}.lora_rank" in user_keys or OmegaConf.select(config, f"{model}.lora_rank") != 0:
            defaults = tuple(d for d in defaults if d.key != f"{model}.lora_alpha")
    if OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode"):
        defaults = tuple(d for d in defaults if d.key != "algorithm.rollout_correction.rollout_is")
    with open_dict(config):
        engine_key = f"{ACTOR}.fsdp_config.use_torch_compile"
        if _get(config, f"{ACTOR}.use_torch_compile") is False and engine_key not in user_keys:
            # verl's engine reads this one alone (workers/engine/fsdp/transformer_impl.py)
            _set(config, engine_key, False, f"as {ACTOR}.use_torch_compile", notify)
        for rule in defaults:
            set_by_user = any(rule.key == key or rule.key.startswith(f"{key}.") for key in user_keys)
            if not set_by_user and _get(config, rule.key) == rule.stock:
                _set(config, rule.key, rule.value, rule.why, notify)
        force(config, on_cpu, notify)


def trained_models(config: DictConfig) -> tuple[str, ...]:
    """Keys of the models that a run trains: the actor's, and with a critic (verl/trainer/ppo/utils.py, need_critic) its."""
    critic = _get(config, "critic.enable")
    if critic is None:
        critic = _get(config, "algorithm.adv_estimator") == "gae"
    return (MODEL, CRITIC) if critic else (MODEL,)


def _is_separate(config: DictConfig) -> bool:
    """Whether engines of their own sample, before or after :func:`force`."""
    return _get(config, "trainer.v1.trainer_mode") in ("separate_async", TRAINER_MODES["separate_async"])


def _attention_defaults(models: tuple[str, ...]) -> tuple[Default, ...]:
    """verl's default is flash_attention_2; where that is not installed, PyTorch's SDPA, which takes packed sequences too."""
    if importlib.util.find_spec("flash_attn") is not None:
        return ()
    keys = (f"{model}.override_config.attn_implementation" for model in models)
    return tuple(Default(key, None, "sdpa", "flash-attn is not installed") for key in keys)


def force(config: DictConfig, on_cpu: bool, notify: Callable[[str], None]) -> None:
    """Set what QeRL cannot run without. Where that replaces a choice of the user's, ``notify`` says so."""
    for role in (ACTOR, "actor_rollout_ref.ref", "critic"):
        for key in (f"{role}.strategy", f"{role}.fsdp_config.strategy", f"{role}.fsdp.strategy"):
            if _get(config, key) == "fsdp":
                _set(config, key, "fsdp2", "packed weights are sharded by FSDP2", notify)
    if _get(config, f"{ROLLOUT}.load_format") == "dummy":
        _set(config, f"{ROLLOUT}.load_format", "safetensors", "the frozen base is read from disk, not synced", notify)
    if _get(config, f"{ROLLOUT}.engine_kwargs.vllm") is None:
        _set(config, f"{ROLLOUT}.engine_kwargs.vllm", {}, "room for the worker extension", notify)
    extension = f"{ROLLOUT}.engine_kwargs.vllm.worker_extension_cls"
    if _get(config, extension) is None:
        _set(config, extension, WORKER_EXTENSION, "the noise in the engine", notify)
    _set(
        config,
        f"{ROLLOUT}.engine_kwargs.vllm.additional_config.qerl",
        rollout_layers(config),
        "the NVFP4 layers",
        notify,
    )
    for model in trained_models(config):
        if _get(config, f"{model}.use_liger"):
            why = "NVFP4 models run without Liger; with use_torch_compile, TorchInductor compiles norms and activation functions"
            _set(config, f"{model}.use_liger", False, why, notify)
    for checkpoint in (f"{ACTOR}.checkpoint", "critic.checkpoint"):
        if _get(config, checkpoint) is not None:
            _set(config, f"{checkpoint}.save_lora_only", True, "the base is frozen and lies in the cache", notify)
    mode = _get(config, "trainer.v1.trainer_mode")
    if mode in TRAINER_MODES:
        _set(config, "trainer.v1.trainer_mode", TRAINER_MODES[mode], "verl's trainer with the noise schedule", notify)
    environment = {}
    if on_cpu:
        environment |= {name: os.environ.get(name, value) for name, value in CPU_ENVIRONMENT.items()}
        if reason := missing_compiler("cpu"):
            # vLLM compiles its sampling on a CPU, also with enforce_eager (v1/sample/ops/topk_topp_sampler.py, forward_cpu)
            environment["TORCH_COMPILE_DISABLE"] = "1"
            notify(f"TORCH_COMPILE_DISABLE=1, nothing is compiled: {reason}")
        slots = _get(config, "trainer.n_gpus_per_node")
        if _is_separate(config):
            slots += _get(config, f"{ROLLOUT}.nnodes") * _get(config, f"{ROLLOUT}.n_gpus_per_node")
        _set(config, "trainer.device", "cpu", "no GPU", notify)
        if _get(config, "ray_kwargs.ray_init.address") is None and not os.environ.get("RAY_ADDRESS"):
            _set(config, "ray_kwargs.ray_init.num_gpus", slots, "slots for workers, not GPUs", notify)
            if _get(config, "ray_kwargs.ray_init.num_cpus") is None:
                _set(config, "ray_kwargs.ray_init.num_cpus", 8 + 8 * slots, "verl reserves logical CPUs", notify)
            if _get(config, "ray_kwargs.ray_init.include_dashboard") is None:
                _set(config, "ray_kwargs.ray_init.include_dashboard", False, "a faster start", notify)
    for key, variable in (("qerl.kernel", KERNEL_ENV), ("qerl.recompute", RECOMPUTE_ENV)):
        if _get(config, key) not in (None, "auto"):
            environment[variable] = _get(config, key)
    user_environment = _get(config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    merged = {**environment, **user_environment, SWITCH_ENV: "nvfp4", "VERL_ENGINE_VENDOR": ENGINE_VENDOR}
    _set(config, "ray_kwargs.ray_init.runtime_env.env_vars", merged, "every process learns of the switch", notify)


def rollout_layers(config: DictConfig) -> dict[str, Any]:
    """What every process of the rollout engine learns through vLLM's ``additional_config``, see rollout/quantization.py."""
    settings = RolloutSettings(
        **OmegaConf.to_container(_get(config, "qerl.rollout") or OmegaConf.create(), resolve=True)
    )
    lora = None
    if settings.lora == "inline":
        lora = {"rank": _get(config, f"{MODEL}.lora_rank"), "alpha": _get(config, f"{MODEL}.lora_alpha")}
    return {"kernel": settings.kernel, "lora": lora, "sleep_level": settings.sleep_level}


def find_problems(config: DictConfig) -> list[str]:
    """Combinations that cannot work, one sentence each with the key and the cure. Empty when all is well.

    Args:
        config: the configuration after :func:`apply_rules`.
    """
    out = []

    def refuse(condition: Any, text: str) -> None:
        if condition:
            out.append(text)

    get = lambda key: _get(config, key)  # noqa: E731
    if get("trainer.device") == "cpu":
        for key in ("qerl.kernel", "qerl.rollout.kernel"):
            refuse(get(key) not in (None, "auto", "pytorch"), f"{key}={get(key)}: there is no GPU; use auto or pytorch")
    refuse(get("trainer.use_v1") is False, "trainer.use_v1=False: QeRL runs on verl's V1 trainer; remove the setting")
    mode = get("trainer.v1.trainer_mode")
    refuse(
        mode not in TRAINER_MODES.values(),
        f"trainer.v1.trainer_mode={mode}: QeRL runs with verl's own trainers; set {' or '.join(TRAINER_MODES)}",
    )
    refuse(
        get(f"{ROLLOUT}.name") != "vllm",
        f"{ROLLOUT}.name={get(f'{ROLLOUT}.name')}: the NVFP4 rollout runs in vLLM; set it to vllm",
    )
    models = trained_models(config)
    for role in (ACTOR, "critic")[: len(models)]:
        strategy = get(f"{role}.strategy")
        refuse(
            strategy != "fsdp2",
            f"{role}.strategy={strategy}: NVFP4 training runs on FSDP2; set {role}.strategy=fsdp2 (model_engine=dp)",
        )
    refuse(
        get(f"{MODEL}.lora.merge"),
        f"{MODEL}.lora.merge=True: a LoRA delta is lost when it is rounded to 4 bits; remove it, the rollout applies the "
        "adapter beside the base",
    )
    refuse(
        get(f"{ROLLOUT}.quantization"),
        f"{ROLLOUT}.quantization={get(f'{ROLLOUT}.quantization')}: the rollout already runs the NVFP4 checkpoint; remove it",
    )
    qat_keys = (f"{ACTOR}.fsdp_config.qat.enable", f"{ROLLOUT}.qat.enable", "critic.fsdp.qat.enable")
    qat = next((k for k in qat_keys if get(k)), None)
    refuse(qat, f"{qat}=True: QAT trains the weights that QeRL keeps frozen in 4 bits; remove it")
    backend = get(f"{ROLLOUT}.checkpoint_engine.backend")
    if mode == TRAINER_MODES["separate_async"]:
        for problem in _separate_problems(config):
            refuse(True, problem)
    else:
        refuse(
            backend not in ("naive", None),
            f"{ROLLOUT}.checkpoint_engine.backend={backend}: it is for trainer.v1.trainer_mode=separate_async; use naive",
        )
    extension = get(f"{ROLLOUT}.engine_kwargs.vllm.worker_extension_cls")
    refuse(
        extension != WORKER_EXTENSION,
        f"{ROLLOUT}.engine_kwargs.vllm.worker_extension_cls={extension}: QeRL needs its own, {WORKER_EXTENSION}; remove the setting",
    )
    refuse(
        get(f"{ROLLOUT}.disaggregation.enabled"),
        f"{ROLLOUT}.disaggregation.enabled=True: not supported with QeRL; remove it",
    )
    refuse(
        get(f"{ACTOR}.freeze_vision_tower"), f"{ACTOR}.freeze_vision_tower=True: only dense text models are supported"
    )
    refuse(
        get("distillation.enabled"),
        "distillation.enabled=True: on-policy distillation is not supported with QeRL; remove it",
    )
    estimator = get("algorithm.adv_estimator")
    refuse(
        estimator in UNCOMPUTED,
        f"algorithm.adv_estimator={estimator}: verl's V1 trainer, on which QeRL runs, does not compute what it needs, "
        f"{UNCOMPUTED.get(estimator)}, so a run without QeRL fails as well; use grpo, rloo or another estimator",
    )
    for model in models:
        for problem in _model_problems(config, model):
            refuse(True, problem)
    return out


def _separate_problems(config: DictConfig) -> list[str]:
    """What engines of their own cannot do with QeRL, and what verl's trainer asserts when Ray and the model's processes run
    already (verl/trainer/ppo/v1/trainer_separate_async.py, __init__)."""
    get = lambda key: _get(config, key)  # noqa: E731
    engine = f"{ROLLOUT}.checkpoint_engine.backend"
    backend, on_cpu = get(engine), get("trainer.device") == "cpu"
    batch, updates = get("data.train_batch_size"), get("trainer.v1.separate_async.parameter_sync_step")
    mini_batch = get(f"{ACTOR}.ppo_mini_batch_size")
    mode = "trainer.v1.trainer_mode=separate_async"
    found = {
        f"{engine}={backend}: it reaches engines on the actor's own GPUs alone; use {TRANSPORT} (or nccl, on GPUs) with {mode}":
        backend == "naive",
        f"{engine}=delta_sharded: it sends what changed in 16-bit weights, and those do not change; use {TRANSPORT} or nccl":
        backend == "delta_sharded",
        f"{engine}={backend}: there is no GPU; use {TRANSPORT}":
        on_cpu and backend not in (TRANSPORT, "naive", "delta_sharded"),
        f"{ROLLOUT}.nnodes=0: {mode} samples on nodes of their own; give their number, and their GPUs each with "
        f"{ROLLOUT}.n_gpus_per_node": get(f"{ROLLOUT}.nnodes") == 0,
        f"data.train_batch_size={batch}: {mode} makes trainer.v1.separate_async.parameter_sync_step={updates} updates of "
        f"{ACTOR}.ppo_mini_batch_size={mini_batch} prompts from a batch; set it to {updates * mini_batch}":
        batch != updates * mini_batch,
        f"reward.reward_model.enable=True: with {mode} a reward model needs GPUs of its own; set "
        "reward.reward_model.enable_resource_pool=True":
        get("reward.reward_model.enable") and not get("reward.reward_model.enable_resource_pool"),
    }  # fmt: skip
    return [text for text, applies in found.items() if applies]


def _model_problems(config: DictConfig, model: str) -> list[str]:
    """What holds for the actor's model and for the critic's alike."""
    get = lambda name: _get(config, f"{model}.{name}")  # noqa: E731
    rank, attention = get("lora_rank"), get("override_config.attn_implementation")
    on_cpu = _get(config, "trainer.device") == "cpu"
    packed = get("use_remove_padding") and not on_cpu
    role, engine = (ACTOR, "fsdp_config") if model == MODEL else ("critic", "fsdp")
    divided = f"{role}.{engine}.ulysses_sequence_parallel_size"
    if (_get(config, divided) or 1) == 1:
        divided = f"{role}.ulysses_sequence_parallel_size"  # the older name
    flash = (attention or "flash_attention_2").startswith("flash_attention") and not on_cpu
    found = {
        f"lora_rank={rank}: the NVFP4 base is frozen, so there would be nothing to train; remove the setting (32 is then "
        "used) or give a positive rank": not isinstance(rank, int) or rank <= 0,
        f"lora.rank={get('lora.rank')}: that is Megatron's setting; use {model}.lora_rank": get("lora.rank"),
        "mtp.enable=True: multi-token prediction layers are not quantized; remove it": get("mtp.enable"),
        f"target_parameters: LoRA on bare parameters needs 16-bit weights; use {model}.target_modules": get(
            "target_parameters"
        ),
        f"use_remove_padding=True with override_config.attn_implementation={attention}: packed sequences need "
        "flash_attention_2 or sdpa": packed and attention == "eager",
        f"override_config.attn_implementation={attention} with {divided}={_get(config, divided)}: verl exchanges the heads in "
        "front of flash-attn alone (models/transformers/monkey_patch.py), so each rank would attend to its own part of a sequence "
        f"without a word; install flash-attn and set flash_attention_2, or {divided}=1": (_get(config, divided) or 1)
        > 1
        and not flash,
    }
    return [f"{model}.{text}" for text, applies in found.items() if applies]


def _get(config: DictConfig, key: str) -> Any:
    if OmegaConf.is_missing(_parent(config, key), key.rpartition(".")[2]):
        return None
    return OmegaConf.select(config, key)


def _parent(config: DictConfig, key: str) -> Any:
    parent = key.rpartition(".")[0]
    return (OmegaConf.select(config, parent) if parent else config) or OmegaConf.create()


def _set(config: DictConfig, key: str, value: Any, why: str, notify: Callable[[str], None]) -> None:
    before = _get(config, key)
    if before == value:
        return
    OmegaConf.update(config, key, value, force_add=True)
    if not key.endswith("env_vars"):
        notify(f"{key}: {before} -> {value} ({why})")
