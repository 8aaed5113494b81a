"""Checks for settings that cannot work with QeRL, alone or together, after the rules
(:mod:`qerl_verl.config.rules`).

:data:`REFUSED` and :data:`REFUSED_OF_A_MODEL` are tables: a new refusal is a new row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig

from qerl_verl.config.keys import Get, get_value
from qerl_verl.config.rules import (
    ACTOR,
    MODEL,
    PACKED_ATTENTION,
    ROLLOUT,
    TRAINER_MODES,
    TRANSPORT,
    UNCOMPUTED,
    WORKER_EXTENSION,
    is_separate,
    trained_models,
)
from qerl_verl.config.settings import ADAPTIVE


@dataclass(frozen=True)
class Refused:
    """A value of one setting that cannot work.

    Attributes:
        key: the setting; in the table of a model, below the model.
        when: whether the value is refused; given the value, and a function that reads another
            setting.
        why: the rest of the message, which begins with ``key=value:``: the reason and the fix.
            ``{value}`` in it is the value.
    """

    key: str
    when: Callable[[Any, Get], Any]
    why: str

    def message(self, get: Get, prefix: str = "") -> str | None:
        """Returns the problem, or None."""
        value = get(prefix + self.key)
        if not self.when(value, get):
            return None
        return f"{prefix}{self.key}={value}: {self.why.format(value=value)}"


def _is_set(value: Any, get: Get) -> bool:
    return bool(value)


def _is_gpu_kernel_on_cpu(value: Any, get: Get) -> bool:
    return get("trainer.device") == "cpu" and value not in (None, "auto", "pytorch")


def _uses_rollout_log_probs(get: Get) -> bool:
    return any(get(f"algorithm.rollout_correction.{key}") for key in ("rollout_is", "rollout_rs", "bypass_mode"))


def _is_adaptive(schedule: Any, get: Get) -> bool:
    return schedule == ADAPTIVE and get("qerl.aqn.enable") is not False


def _is_on_vllms_path(get: Get) -> bool:
    """Returns whether the rollout's adapter is on vLLM's own LoRA path."""
    return get("qerl.rollout.lora") == "punica" or get("qerl.arm") in ("bf16", "nf4")


_QAT = "QAT trains the weights that QeRL keeps frozen; remove it"

REFUSED = (
    Refused("qerl.kernel", _is_gpu_kernel_on_cpu, "there is no GPU; use auto or pytorch"),
    Refused("qerl.rollout.kernel", _is_gpu_kernel_on_cpu, "there is no GPU; use auto or pytorch"),
    Refused("trainer.use_v1", lambda v, get: v is False, "QeRL runs on verl's V1 trainer; remove the setting"),
    Refused("trainer.v1.trainer_mode", lambda v, get: v not in TRAINER_MODES.values(),
            f"QeRL runs with verl's own trainers; set {' or '.join(TRAINER_MODES)}"),
    Refused(f"{ROLLOUT}.name", lambda v, get: v != "vllm", "the rollout runs in vLLM; set it to vllm"),
    Refused(f"{ROLLOUT}.quantization", _is_set, "+qerl= chooses what the base is stored in, in the rollout too; remove it"),
    Refused(f"{ROLLOUT}.engine_kwargs.vllm.quantization",
            lambda v, get: v is not None and (v, get("qerl.arm")) != ("bitsandbytes", "nf4"),
            "+qerl= chooses what the base is stored in, in the rollout too; remove it"),
    Refused(f"{ROLLOUT}.engine_kwargs.vllm.worker_extension_cls", lambda v, get: v != WORKER_EXTENSION,
            f"QeRL needs its own, {WORKER_EXTENSION}; remove the setting"),
    Refused(f"{ROLLOUT}.disaggregation.enabled", _is_set, "not supported with QeRL; remove it"),
    Refused(f"{ROLLOUT}.checkpoint_engine.backend",
            lambda v, get: v not in ("naive", None) and get("trainer.v1.trainer_mode") != TRAINER_MODES["separate_async"],
            "it is for trainer.v1.trainer_mode=separate_async; use naive"),
    Refused(f"{ACTOR}.fsdp_config.qat.enable", _is_set, _QAT),
    Refused(f"{ROLLOUT}.qat.enable", lambda v, get: v and not get(f"{ACTOR}.fsdp_config.qat.enable"), _QAT),
    Refused("critic.fsdp.qat.enable", _is_set, _QAT),
    Refused(f"{ROLLOUT}.calculate_log_probs", lambda v, get: v is False and _uses_rollout_log_probs(get),
            "algorithm.rollout_correction works with the log-probabilities of the rollout; "
            "without them verl leaves the correction out or fails in the first step; remove the "
            "setting"),
    Refused("algorithm.rollout_correction.rollout_is", lambda v, get: v not in (None, "token", "sequence"),
            "verl knows token and sequence; null takes the correction away"),
    Refused("qerl.aqn.schedule",
            lambda v, get: _is_adaptive(v, get) and get(f"{ROLLOUT}.calculate_log_probs") is False,
            "sigma follows the divergence between rollout and actor, which needs the rollout's "
            f"log-probabilities; remove {ROLLOUT}.calculate_log_probs=False, or choose another "
            "schedule"),
    Refused("qerl.aqn.schedule",
            lambda v, get: _is_adaptive(v, get) and get("algorithm.rollout_correction.bypass_mode"),
            "sigma follows the divergence between rollout and actor, and in verl's bypass mode the "
            "actor's log-probabilities are not computed; remove algorithm.rollout_correction."
            "bypass_mode=True, or choose another schedule"),
    Refused(f"{MODEL}.lora_rank", lambda v, get: _is_on_vllms_path(get) and isinstance(v, int) and v > 512,
            "vLLM's own LoRA path takes ranks up to 512; set a lower rank, or with packed layers qerl.rollout.lora=inline"),
    Refused("distillation.enabled", _is_set, "on-policy distillation is not supported with QeRL; remove it"),
)  # fmt: skip


REFUSED_OF_A_MODEL = (
    Refused("lora_rank", lambda v, get: not isinstance(v, int) or v <= 0,
            "the base is frozen, so there would be nothing to train; remove the setting (32 is "
            "then used) or give a positive rank"),
    Refused("lora_alpha", lambda v, get: v is not None and not (isinstance(v, int | float) and 0 < v < math.inf),
            "the LoRA delta would be multiplied by that, so that nothing trains; give a positive number"),
    Refused("lora.merge", _is_set, "the adapter alone is sent to the rollout, which applies it beside the base (rounded to 4 "
            "bits, a LoRA delta is lost); remove it"),
    Refused("mtp.enable", _is_set, "multi-token prediction layers are not quantized; remove it"),
    Refused("target_parameters", _is_set, "QeRL puts LoRA on linear layers, not on bare parameters; use target_modules"),
)  # fmt: skip
"""For the actor's model and the critic's alike."""


MEGATRON_LORA = {
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "target_modules": "target_modules",
    "exclude_modules": "exclude_modules",
    "adapter_path": "lora_adapter_path",
}
"""Settings under ``model.lora``, which verl reads for Megatron alone, and those beside it that FSDP
reads."""


def find_problems(config: DictConfig, keys: Collection[str] = ()) -> list[str]:
    """Returns settings that cannot work, one sentence each with the key and the fix; empty if there
    is no problem.

    Args:
        config: the configuration after the rules (:mod:`qerl_verl.config.rules`).
        keys: dotted keys that the user wrote.
    """
    get, models = partial(get_value, config), trained_models(config)
    found = [row.message(get) for row in REFUSED]
    found += [row.message(get, f"{model}.") for model in models for row in REFUSED_OF_A_MODEL]
    found += [_strategy_problem(get, role) for role in (ACTOR, "critic")[: len(models)]]
    found.append(_estimator_problem(get))
    out = [problem for problem in found if problem]
    for model in models:
        out += _model_problems(get, model) + _megatron_lora_problems(get, model, keys)
    out += _micro_batch_problems(get, is_separate(config))
    return out + (_separate_problems(get) if is_separate(config) else [])


LORA_RATE = 1e-5
"""The paper's learning rate for QeRL (arXiv 2510.11696, Table 4)."""


def find_remarks(config: DictConfig, changed: Collection[str] = ()) -> list[str]:
    """Returns settings that can run but may not be meant, one line each.

    Args:
        config: the configuration after the rules (:mod:`qerl_verl.config.rules`).
        changed: dotted keys that the switch set.
    """
    get = partial(get_value, config)
    out = []
    correction = "algorithm.rollout_correction"
    corrected = get(f"{correction}.rollout_is") or get(f"{correction}.bypass_mode")
    if get("qerl.aqn.enable") and not corrected:
        out.append(
            f"{correction}.rollout_is: null stays, as you wrote it: samples of the noised policy "
            "are trained on without importance sampling"
        )
    rate = get(f"{ACTOR}.optim.lr")
    if f"{MODEL}.lora_rank" in changed and isinstance(rate, int | float) and 0 < rate < LORA_RATE / 2:
        out.append(
            f"{ACTOR}.optim.lr={rate:g} stays: LoRA takes a higher rate than full fine-tuning, and "
            f"the paper trains QeRL with {LORA_RATE:g}"
        )
    program = "ray_kwargs.ray_init.runtime_env.py_executable"
    if command := get(program):
        out.append(
            f"{program}={command}: Ray starts the workers with this command, so QeRL has to be "
            "installed in its environment, with the versions of this one; null takes this one"
        )
    return out


def _strategy_problem(get: Get, role: str) -> str | None:
    strategy = get(f"{role}.strategy")
    if strategy == "fsdp2":
        return None
    if (engine := get("model_engine")) not in ("dp", None):
        return (
            f"{role}.strategy={strategy}: QeRL trains with FSDP2; set model_engine=dp, verl's default, "
            f"in place of {engine}, and remove the settings that only {engine} has"
        )
    return f"{role}.strategy={strategy}: QeRL trains with FSDP2; set {role}.strategy=fsdp2"


def _estimator_problem(get: Get) -> str | None:
    estimator = get("algorithm.adv_estimator")
    if estimator not in UNCOMPUTED:
        return None
    return (
        f"algorithm.adv_estimator={estimator}: verl's V1 trainer, on which QeRL runs, does not "
        f"compute what it needs, {UNCOMPUTED[estimator]}, so a run without QeRL fails as well; use "
        "grpo, rloo or another estimator"
    )


def _separate_problems(get: Get) -> list[str]:
    """Returns the settings that separate engines do not support with QeRL, or that verl's trainer
    asserts only after Ray and the model's processes have started
    (verl/trainer/ppo/v1/trainer_separate_async.py, __init__).
    """
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
        f"{ROLLOUT}.nnodes=0: {mode} samples on nodes of their "
        "own; give their number, and their GPUs each with "
        f"{ROLLOUT}.n_gpus_per_node": get(f"{ROLLOUT}.nnodes") == 0,
        f"data.train_batch_size={batch}: {mode} makes "
        f"trainer.v1.separate_async.parameter_sync_step={updates} updates of "
        f"{ACTOR}.ppo_mini_batch_size={mini_batch} prompts from a batch; set it to "
        f"{updates * mini_batch}":
        batch != updates * mini_batch,
        f"reward.reward_model.enable=True: with {mode} a reward model needs GPUs of its own; set "
        "reward.reward_model.enable_resource_pool=True":
        get("reward.reward_model.enable") and not get("reward.reward_model.enable_resource_pool"),
    }  # fmt: skip
    return [text for text, applies in found.items() if applies]


def _micro_batch_problems(get: Get, separate: bool) -> list[str]:
    """Returns the micro-batches of a fixed size that do not divide what a GPU computes in them.

    verl asserts that in the first step (verl/workers/engine/utils.py, ``prepare_micro_batches``).
    That training and log-probabilities are divided in the same way, it asserts after the model's
    processes have started (verl/workers/engine_workers.py).

    Args:
        get: the value of a setting.
        separate: the rollout engines have GPUs of their own.
    """
    dynamic = f"{ACTOR}.use_dynamic_bsz", f"{ROLLOUT}.log_prob_use_dynamic_bsz"
    if bool(get(dynamic[0])) != bool(get(dynamic[1])):
        return [
            f"{dynamic[0]}={get(dynamic[0])} and {dynamic[1]}={get(dynamic[1])}: verl divides training and "
            "log-probabilities in the same way; set both to the same value"
        ]
    if get(dynamic[0]):
        return []
    update, step = _samples_per_gpu(get)
    reference = get("algorithm.use_kl_in_reward") or get(f"{ACTOR}.use_kl_loss")
    rows = [(f"{ACTOR}.ppo_micro_batch_size_per_gpu", update)]
    if not get("algorithm.rollout_correction.bypass_mode") or reference:
        rows.append((f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", update if separate else step))
    return [
        f"{key}={size}: each GPU computes {samples} samples in such micro-batches, and verl takes divisors of that "
        f"alone; set it to {math.gcd(size, samples)} or another one"
        for key, samples in rows
        if samples and isinstance(size := get(key), int) and samples % size
    ]


def _samples_per_gpu(get: Get) -> tuple[int, int]:
    """Returns the number of samples of an update and of a step on each GPU.

    It is 0 for what verl does not divide evenly, and for a step that it fills up with padding.
    """
    ulysses = max(get(f"{ACTOR}.{key}ulysses_sequence_parallel_size") or 1 for key in ("fsdp_config.", ""))
    groups = get("trainer.n_gpus_per_node") * get("trainer.nnodes") // ulysses
    prompts, batch, samples = get(f"{ACTOR}.ppo_mini_batch_size"), get("data.train_batch_size"), get(f"{ROLLOUT}.n")
    if not groups or prompts * samples % groups:
        return 0, 0
    return prompts * samples // groups, 0 if batch % prompts else batch * samples // groups


def _megatron_lora_problems(get: Get, model: str, keys: Collection[str]) -> list[str]:
    """Returns settings under ``model.lora`` that FSDP ignores, even if the user wrote the default
    value.
    """
    prefix = f"{model}.lora."
    found = {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} - {"merge"}
    if get(f"{prefix}rank"):
        found.add("rank")
    out = []
    for name in sorted(found):
        other = MEGATRON_LORA.get(name.partition(".")[0])
        fix = f"use {model}.{other}" if other else "remove it"
        out.append(f"{prefix}{name}={get(prefix + name)}: that is Megatron's setting, which FSDP2 ignores; {fix}")
    return out


def _model_problems(get: Get, model: str) -> list[str]:
    """Returns refused combinations that apply to the actor's model and to the critic's alike."""
    attention = get(f"{model}.override_config.attn_implementation")
    on_cpu = get("trainer.device") == "cpu"
    packed = get(f"{model}.use_remove_padding") and not on_cpu
    role, engine = (ACTOR, "fsdp_config") if model == MODEL else ("critic", "fsdp")
    divided = f"{role}.{engine}.ulysses_sequence_parallel_size"
    if (get(divided) or 1) == 1:
        divided = f"{role}.ulysses_sequence_parallel_size"  # the older name
    exchanges = attention == PACKED_ATTENTION or (
        (attention or "flash_attention_2").startswith("flash_attention") and not on_cpu
    )
    found = {
        "use_remove_padding=True with "
        f"override_config.attn_implementation={attention}: "
        "packed sequences need flash_attention_2, "
        f"{PACKED_ATTENTION} or sdpa": packed and attention == "eager",
        f"override_config.attn_implementation={attention} "
        f"with {divided}={get(divided)}: heads are "
        "exchanged between ranks for "
        f"flash_attention_2 and {PACKED_ATTENTION} "
        "alone, so each rank would attend to its own "
        f"part of a sequence; set {PACKED_ATTENTION}, "
        f"or {divided}=1": (get(divided) or 1) > 1 and not exchanges,
    }
    return [f"{model}.{text}" for text, applies in found.items() if applies]
