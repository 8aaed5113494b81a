"""Holds the values that the switch sets in verl's configuration. :mod:`qerl_verl.config.checks` has
what it refuses.

Two tables, applied in the driver before Ray starts:

- :data:`DEFAULTS` replaces a value that is still verl's own default. A value from the command line
  or from a recipe stays.
- :data:`REQUIREMENTS` sets what QeRL cannot run without, whoever set the key before.

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from omegaconf import DictConfig
from packaging.version import Version

from qerl_verl.config.arms import Arm, get_arm
from qerl_verl.config.draft import Draft
from qerl_verl.config.keys import ACTOR, CRITIC, MODEL, ROLLOUT, VARIABLES, get_value, is_written
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

COMPILATION = '{"inductor_compile_config": {"triton.enable_pdl": true}}'
"""vLLM's ``compilation_config``. TorchInductor's kernels are launched while the kernel before them
ends (programmatic dependent launch). Each of them waits before it reads what its predecessor writes
(torch/_inductor/codegen/triton.py, _handle_pdl_before_access) and lets its successor start only
then. The Hopper kernels let theirs start at once, and end after their own wait. So a launch never
reads what is unfinished."""

UNCOMPUTED = {
    "remax": "the reward of a greedy response (reward_baselines)",
    "optimal_token_baseline": "sum_pi_squared",
    "tir_optimal_token_baseline": "sum_pi_squared",
    "gdpo": "the attention mask that splits the reward into its parts",
}
"""Estimators that verl 0.9.1 itself cannot run in its V1 trainer, and what it would have to compute
(trainer/ppo/v1, trainer_base.py, _compute_advantage)."""

CPU_ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

VERLS_HELPERS = 8
"""Processes of each kind that verl starts beside the engines, whatever the size of the run."""

HELPERS = {
    f"{ROLLOUT}.agent.num_workers": 64,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 64,
    "reward.num_workers": 16,
}
"""Key of a kind of helper process, and how many sequences of a step keep one busy. A reward may be
slow Python code that holds the interpreter's lock, so fewer sequences share a process."""

OLDEST_FLASH_ATTENTION = Version("2.3.3")
"""What transformers requires."""


@dataclass
class Run:
    """The state that the rules depend on.

    Attributes:
        draft: the configuration, with the changes so far.
        keys: dotted keys that the user wrote.
        on_cpu: whether the run takes place on the CPU platform.
        starts_ray: whether the run starts Ray; False if it joins a cluster, which has declared
            its own resources.
        environment: the driver's environment variables.
    """

    draft: Draft
    keys: Collection[str] = ()
    on_cpu: bool = False
    starts_ray: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """Returns the value of a dotted key; None if it is absent."""
        return self.draft.get(key)

    def is_open(self, key: str, stock: Any) -> bool:
        """Returns whether a key has verl's own value, and the user did not write it."""
        return not is_written(key, self.keys) and self.get(key) == stock

    @functools.cached_property
    def arm(self) -> Arm:
        return get_arm(self.draft.config)

    @functools.cached_property
    def models(self) -> tuple[str, ...]:
        """See :func:`trained_models`."""
        return trained_models(self.draft.config)

    @property
    def separate(self) -> bool:
        """See :func:`is_separate`."""
        return is_separate(self.draft.config)

    @functools.cached_property
    def has_flash_attention(self) -> bool:
        return has_flash_attention()

    @functools.cached_property
    def missing_bfloat16(self) -> str | None:
        """Why float32 is faster on this CPU, or None if it is not."""
        return missing_bfloat16(self.environment) if self.on_cpu else None


When = Callable[[Run], bool]


def _always(run: Run) -> bool:
    return True


def _on_cpu(run: Run) -> bool:
    return run.on_cpu


@dataclass(frozen=True)
class Default:
    """Sets ``key`` to ``value`` if it still has verl's ``stock`` value.

    Attributes:
        key: dotted key in verl's configuration.
        stock: verl's own value; None also stands for a key that is absent.
        value: the value, or a function that computes it.
        why: the reason, or a function that words it.
        when: the runs that the row is for, evaluated before any row is applied.
    """

    key: str
    stock: Any
    value: Any
    why: str | Callable[[Run], str]
    when: When = _always


@dataclass(frozen=True)
class Requirement:
    """Sets ``key`` to the value that QeRL requires, whoever set it before.

    Attributes:
        key: dotted key in verl's configuration.
        value: computes the value from the current one, which it returns to leave it.
        why: the reason, or a function that words it.
        when: the runs that the row is for, evaluated after the rows before it were applied.
    """

    key: str
    value: Callable[[Any, Run], Any]
    why: str | Callable[[Run], str]
    when: When = _always


# --- defaults -------------------------------------------------------------------------------------


def _keeps_rank(model: str) -> When:
    """Returns whether the user left the rank of a model open, so that the switch sets alpha with
    it.
    """
    return lambda run: model in run.models and run.is_open(f"{model}.lora_rank", 0)


def _trains(model: str) -> When:
    return lambda run: model in run.models


def _without_flash_attention(model: str) -> When:
    return lambda run: model in run.models and (run.on_cpu or not run.has_flash_attention)


def _attention(run: Run) -> str:
    return "sdpa" if run.on_cpu else PACKED_ATTENTION


def _has_logprob_layer(run: Run) -> bool:
    """Returns whether the actor needs engine/output_layer.py and its model supports it. Without
    flash-attn's cross entropy, verl computes log-probabilities one row after the other.
    """
    return not run.on_cpu and not run.has_flash_attention and run.arm.name != "nf4"


_FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
_POLICY_DTYPES = {f"{ROLLOUT}.dtype": "bfloat16", f"{ACTOR}.fsdp_config.mixed_precision": None}


def _in_float32(run: Run) -> bool:
    """Returns whether the run computes in float32 because the CPU has no bfloat16 arithmetic. With
    nf4, bitsandbytes' layers in the rollout compute in bfloat16 anyway (vllm_bnb_plugin).
    """
    return bool(run.missing_bfloat16) and run.arm.name != "nf4"


def _policy_in_float32(run: Run) -> bool:
    """Returns whether rollout and actor both compute in float32, so that both compute one policy.
    If the user chose the dtype of either, both are left unchanged.
    """
    return _in_float32(run) and all(run.is_open(*row) for row in _POLICY_DTYPES.items())


def _why_float32(run: Run) -> str:
    return f"{run.missing_bfloat16}, float32 is faster"


def _sequences(run: Run) -> int:
    """Returns the number of sequences of a step, 0 if it is unknown."""
    return (run.get("data.train_batch_size") or 0) * (run.get(f"{ROLLOUT}.n") or 0)


def _has_few_sequences(run: Run) -> bool:
    """Returns whether the number of helper processes can be reduced to that of the sequences. Each
    helper imports verl before it can work, which takes 3 to 8 CPU seconds
    (docs/performance-start.md). Agents with tools keep verl's number.
    """
    return not run.on_cpu and _sequences(run) > 0 and not run.get(f"{ROLLOUT}.multi_turn.enable")


def _helpers(share: int) -> Callable[[Run], int]:
    return lambda run: min(VERLS_HELPERS, -(-_sequences(run) // share))


_COMPILE = "compiling costs more than it saves at this size"

DEFAULTS = (
    # verl's engine reads this one alone (workers/engine/fsdp/transformer_impl.py)
    Default(f"{ACTOR}.fsdp_config.use_torch_compile", True, False, f"as {ACTOR}.use_torch_compile",
            lambda run: run.get(f"{ACTOR}.use_torch_compile") is False),
    Default(f"{MODEL}.lora_rank", 0, 32, "QeRL trains LoRA adapters; rank 32 is the paper's"),
    Default(f"{MODEL}.lora_alpha", 16, 32, "scaling 1 at rank 32", _keeps_rank(MODEL)),
    Default(f"{ROLLOUT}.name", None, "vllm", "the rollout runs in vLLM"),
    Default("algorithm.rollout_correction.rollout_is", None, "token",
            "samples come from the noised policy: truncated importance sampling, token by token",
            lambda run: not run.get("algorithm.rollout_correction.bypass_mode")),
    Default(f"{CRITIC}.lora_rank", 0, 32,
            "the critic's base is NVFP4 too: it trains LoRA adapters and the value head", _trains(CRITIC)),
    Default(f"{CRITIC}.lora_alpha", 16, 32, "scaling 1 at rank 32", _keeps_rank(CRITIC)),
    # verl's default is flash_attention_2
    Default(f"{MODEL}.override_config.attn_implementation", None, _attention,
            "flash-attn is not installed", _without_flash_attention(MODEL)),
    Default(f"{CRITIC}.override_config.attn_implementation", None, _attention,
            "flash-attn is not installed", _without_flash_attention(CRITIC)),
    Default(f"{MODEL}.use_fused_kernels", False, True,
            "log-probabilities in chunks of tokens: flash-attn is not installed", _has_logprob_layer),
    Default("trainer.n_gpus_per_node", 8, 1, "one slot on the CPU", _on_cpu),
    Default(f"{ROLLOUT}.tensor_model_parallel_size", 2, 1, "one slot on the CPU", _on_cpu),
    Default(f"{ROLLOUT}.enforce_eager", False, True, "no CUDA graphs on the CPU", _on_cpu),
    Default(f"{ROLLOUT}.free_cache_engine", True, False, "vLLM cannot sleep on the CPU", _on_cpu),
    Default(f"{ROLLOUT}.enable_sleep_mode", None, False, "vLLM cannot sleep on the CPU", _on_cpu),
    Default(f"{ROLLOUT}.agent.num_workers", 8, 1, "few cores", _on_cpu),
    Default(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes", 2048, 64,
            "shared memory is main memory", _on_cpu),
    Default(f"{ROLLOUT}.max_num_batched_tokens", 8192, 2048, "few cores", _on_cpu),
    Default("reward.num_workers", 8, 1, "few cores", _on_cpu),
    Default("data.dataloader_num_workers", 8, 0, "few cores", _on_cpu),
    Default("transfer_queue.backend.SimpleStorage.num_data_storage_units", 8, 1, "few cores", _on_cpu),
    Default(f"{ACTOR}.use_torch_compile", True, False, _COMPILE, _on_cpu),
    Default(f"{ACTOR}.fsdp_config.use_torch_compile", True, False, _COMPILE, _on_cpu),
    Default("actor_rollout_ref.ref.fsdp_config.use_torch_compile", True, False, _COMPILE, _on_cpu),
    Default("critic.fsdp.use_torch_compile", True, False, _COMPILE, _on_cpu),
    Default(f"{ROLLOUT}.dtype", "bfloat16", "float32", _why_float32, _policy_in_float32),
    Default(f"{ACTOR}.fsdp_config.mixed_precision", None, _FLOAT32, _why_float32, _policy_in_float32),
    Default("critic.fsdp.mixed_precision", None, _FLOAT32, _why_float32,
            lambda run: _in_float32(run) and CRITIC in run.models),
    *(Default(key, VERLS_HELPERS, _helpers(share), lambda run: f"{_sequences(run)} sequences a step", _has_few_sequences)
      for key, share in HELPERS.items()),
    Default(f"{ROLLOUT}.engine_kwargs.vllm.compilation_config", None, COMPILATION,
            "kernels start while the one before ends", lambda run: run.arm.container and not run.on_cpu),
    Default(f"{ACTOR}.fsdp_config.model_dtype", "fp32", "bf16",
            "the base is frozen, so it is held in 16 bits; the adapters train in float32",
            lambda run: run.arm.name == "bf16"),
    Default(f"{ROLLOUT}.engine_kwargs.vllm.quantization", None, "bitsandbytes",
            "vLLM quantizes the base to NF4 when it loads it", lambda run: run.arm.name == "nf4"),
    Default(f"{ROLLOUT}.checkpoint_engine.backend", "naive", TRANSPORT,
            "the adapter goes to engines of their own over TCP", lambda run: run.separate),
    Default(f"{ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes", 2048, 256,
            "an adapter, not a model", lambda run: run.separate),
    Default(f"{ROLLOUT}.nnodes", 0, 1, "one slot on the CPU for a rollout engine of its own",
            lambda run: run.separate and run.on_cpu),
)  # fmt: skip


# --- requirements ---------------------------------------------------------------------------------


def _if_absent(value: Any) -> Callable[[Any, Run], Any]:
    return lambda now, run: value if now is None else now


def _to(value: Any) -> Callable[[Any, Run], Any]:
    return lambda now, run: value


def _loads_from_disk(run: Run) -> bool:
    return run.get(f"{ROLLOUT}.load_format") == "dummy" or run.arm.load_format != "safetensors"


def _has(key: str) -> When:
    return lambda run: run.get(key) is not None


def _trains_without_liger(model: str) -> When:
    return lambda run: model in run.models and run.arm.name != "bf16"


def _why_no_liger(run: Run) -> str:
    why = f"{run.arm.base} models run without Liger"
    if run.arm.container:
        why += "; with use_torch_compile, TorchInductor compiles norms and activation functions"
    return why


def _without_hf_model(now: Any, run: Run) -> Any:
    return [part for part in now if part != "hf_model"] if "hf_model" in (now or ()) else now


def _slots(run: Run) -> int:
    """Returns the number of slots that stand for GPUs on the CPU platform."""
    slots = run.get("trainer.n_gpus_per_node")
    if run.separate:
        slots += run.get(f"{ROLLOUT}.nnodes") * run.get(f"{ROLLOUT}.n_gpus_per_node")
    return slots


def _logical_cpus(now: Any, run: Run) -> Any:
    return max(8 + 8 * _slots(run), reserved(run.get).cpus) if now is None else now


def _starts_ray_on_cpu(run: Run) -> bool:
    return run.on_cpu and run.starts_ray


REQUIREMENTS = (
    *(Requirement(f"{role}.{key}", lambda now, run: "fsdp2" if now == "fsdp" else now,
                  lambda run: "packed weights are sharded by FSDP2" if run.arm.container else "as in every arm")
      for role in (ACTOR, "actor_rollout_ref.ref", "critic")
      for key in ("strategy", "fsdp_config.strategy", "fsdp.strategy")),
    Requirement(f"{ROLLOUT}.load_format", lambda now, run: run.arm.load_format,
                "the frozen base is read from disk, not synced", _loads_from_disk),
    Requirement(f"{ROLLOUT}.engine_kwargs.vllm", _if_absent({}), "room for the worker extension"),
    Requirement(f"{ROLLOUT}.engine_kwargs.vllm.worker_extension_cls", _if_absent(WORKER_EXTENSION),
                "the noise in the engine"),
    *(Requirement(f"{model}.use_liger", lambda now, run: False if now else now, _why_no_liger,
                  _trains_without_liger(model))
      for model in (MODEL, CRITIC)),
    *(Requirement(f"{checkpoint}.save_lora_only", _to(True), "the base is frozen",
                  _has(checkpoint))
      for checkpoint in (f"{ACTOR}.checkpoint", "critic.checkpoint")),
    *(Requirement(f"{checkpoint}.save_contents", _without_hf_model,
                  "a checkpoint holds no base to write a model from; `qerl export` writes one that is merged")
      for checkpoint in (f"{ACTOR}.checkpoint", "critic.checkpoint")),
    Requirement("trainer.v1.trainer_mode", lambda now, run: TRAINER_MODES.get(now, now),
                "verl's trainer with the noise schedule"),
    Requirement("trainer.device", _to("cpu"), "no GPU", _on_cpu),
    Requirement("ray_kwargs.ray_init.num_gpus", lambda now, run: _slots(run), "slots for workers, not GPUs",
                _starts_ray_on_cpu),
    Requirement("ray_kwargs.ray_init.num_cpus", _logical_cpus, "verl reserves logical CPUs", _starts_ray_on_cpu),
    Requirement("ray_kwargs.ray_init.include_dashboard", _if_absent(False), "a faster start", _starts_ray_on_cpu),
)  # fmt: skip


def apply_rules(
    draft: Draft,
    keys: Collection[str],
    on_cpu: bool,
    starts_ray: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Applies defaults and requirements, and publishes the run's document (:mod:`qerl_verl.job`).

    Args:
        draft: verl's configuration with the ``qerl`` node.
        keys: dotted keys that the user wrote; a default leaves them alone, also where they have
            verl's value.
        on_cpu, starts_ray, environment: see :class:`Run`.
    """
    run = Run(draft, keys, on_cpu, starts_ray, environment)
    for row in [row for row in DEFAULTS if row.when(run)]:
        if run.is_open(row.key, row.stock):
            draft.set(row.key, row.value(run) if callable(row.value) else row.value, _worded(row.why, run))
    for requirement in REQUIREMENTS:
        if requirement.when(run):
            value = requirement.value(run.get(requirement.key), run)
            draft.set(requirement.key, value, _worded(requirement.why, run))
    if on_cpu:
        variables = cpu_environment(environment, draft.say)
        draft.set(VARIABLES, {**variables, **(run.get(VARIABLES) or {})}, "the CPU platform")
    publish(draft, make_job(draft.config))


def _worded(why: str | Callable[[Run], str], run: Run) -> str:
    return why if isinstance(why, str) else why(run)


def trained_models(config: DictConfig) -> tuple[str, ...]:
    """Returns the keys of the models that a run trains: the actor's, and the critic's if there is
    one (verl/trainer/ppo/utils.py, need_critic).
    """
    critic = get_value(config, "critic.enable")
    if critic is None:
        critic = get_value(config, "algorithm.adv_estimator") == "gae"
    return (MODEL, CRITIC) if critic else (MODEL,)


def is_separate(config: DictConfig) -> bool:
    """Returns whether separate engines sample, before or after the rules."""
    mode = get_value(config, "trainer.v1.trainer_mode")
    return mode in ("separate_async", TRAINER_MODES["separate_async"])


def has_flash_attention() -> bool:
    """Returns whether flash_attention_2 can be used, as transformers decides it
    (is_flash_attn_2_available).

    transformers returns False if no GPU is visible, for example on a login node or the head of a
    cluster. In that case the package alone decides, since the workers have the same one. The folder
    ``flash_attn`` is no evidence, since other packages install one too.
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


def cpu_environment(environment: Mapping[str, str], notify: Callable[[str], None]) -> dict[str, str]:
    """Returns the environment variables of the processes that run vLLM's CPU engine.

    Args:
        environment: the caller's; its variables stay, as far as vLLM can run with them.
        notify: called with one line for each variable that changes how the engine computes.
    """
    variables = {name: environment.get(name, value) for name, value in CPU_ENVIRONMENT.items()}
    if reason := missing_compiler("cpu"):
        # vLLM compiles its sampling on a CPU, also with enforce_eager
        # (v1/sample/ops/topk_topp_sampler.py, forward_cpu)
        variables["TORCH_COMPILE_DISABLE"] = "1"
        notify(f"TORCH_COMPILE_DISABLE=1, nothing is compiled: {reason}")
    if environment.get("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0)))) == "1":
        # vLLM 0.28, also without QeRL: "double free or corruption" once a batch mixes prefill and
        # decoding
        variables["OMP_NUM_THREADS"] = "2"
        notify("OMP_NUM_THREADS=2 in the job's processes: vLLM's CPU engine corrupts its memory on one thread")
    return variables
