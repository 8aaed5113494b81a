"""What is refused before Ray starts: one row a case."""

import re
from pathlib import Path

import pytest
import verl
from verl.trainer.ppo.core_algos import AdvantageEstimator

from qerl_verl.config import rules
from qerl_verl.config.checks import recipe

MICRO = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"
SEPARATE = (
    "trainer.v1.trainer_mode=separate_async",
    "actor_rollout_ref.rollout.nnodes=1",
    "data.train_batch_size=64",
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
)


@pytest.mark.parametrize("setting", ["qerl.kernel=hopper", "qerl.rollout.kernel=marlin"])
def test_a_gpus_kernel_is_refused_on_the_cpu(switched, setting):
    _, _, problems = switched(setting, on_cpu=True)
    assert problems == [f"{setting}: there is no GPU; use auto or pytorch"]
    assert switched(setting)[2] == []


@pytest.mark.parametrize(
    ("override", "key", "fix"),
    [
        ("actor_rollout_ref.model.lora.merge=True", "actor_rollout_ref.model.lora.merge=True", "remove it"),
        ("actor_rollout_ref.model.lora_rank=0", "actor_rollout_ref.model.lora_rank=0", "positive rank"),
        ("actor_rollout_ref.model.lora_alpha=0", "actor_rollout_ref.model.lora_alpha=0", "give a positive number"),
        ("actor_rollout_ref.model.lora_alpha=-8", "actor_rollout_ref.model.lora_alpha=-8", "give a positive number"),
        ("qerl.rollout.lora=punica actor_rollout_ref.model.lora_rank=1024", "lora_rank=1024", "qerl.rollout.lora=inline"),
        ("actor_rollout_ref.model.lora.rank=16", "actor_rollout_ref.model.lora.rank=16", "lora_rank"),
        ("actor_rollout_ref.rollout.name=sglang", "actor_rollout_ref.rollout.name=sglang", "vllm"),
        ("actor_rollout_ref.rollout.quantization=fp8", "rollout.quantization=fp8", "remove it"),
        ("actor_rollout_ref.actor.fsdp_config.qat.enable=True", "qat.enable=True", "remove it"),
        ("actor_rollout_ref.actor.fsdp_config.strategy=fsdp2 actor_rollout_ref.actor.strategy=fsdp_turbo",
         "actor_rollout_ref.actor.strategy=fsdp_turbo", "fsdp2"),
        ("trainer.v1.trainer_mode=mine", "trainer.v1.trainer_mode=mine", "sync or colocate_async or separate_async"),
        ("trainer.use_v1=False", "trainer.use_v1=False", "remove"),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=nccl", "checkpoint_engine.backend=nccl", "naive"),
        ("+actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls=a.B", "worker_extension_cls=a.B", "remove"),
        ("actor_rollout_ref.model.mtp.enable=True", "mtp.enable=True", "remove it"),
        ("algorithm.adv_estimator=remax", "algorithm.adv_estimator=remax", "use grpo, rloo or another"),
        ("algorithm.adv_estimator=gdpo", "algorithm.adv_estimator=gdpo", "use grpo, rloo or another"),
        ("algorithm.adv_estimator=gae critic.model.lora_rank=0", "critic.model.lora_rank=0", "positive rank"),
        ("algorithm.adv_estimator=gae critic.model.lora.rank=8", "critic.model.lora.rank=8", "critic.model.lora_rank"),
        ("algorithm.adv_estimator=gae critic.strategy=fsdp_turbo", "critic.strategy=fsdp_turbo", "fsdp2"),
        ("algorithm.adv_estimator=gae critic.fsdp.qat.enable=True", "critic.fsdp.qat.enable=True", "remove it"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_key_and_the_cure(switched, override, key, fix):
    _, _, problems = switched(*override.split())
    assert len(problems) == 1, problems
    assert key in problems[0] and fix in problems[0]


@pytest.mark.parametrize(
    ("override", "on_cpu", "key", "fix"),
    [
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=naive", False, "backend=naive", "use qerl (or nccl"),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=delta_sharded", False, "backend=delta_sharded", "use qerl"),
        ("actor_rollout_ref.rollout.checkpoint_engine.backend=nccl", True, "backend=nccl: there is no GPU", "use qerl"),
        ("actor_rollout_ref.rollout.nnodes=0", False, "rollout.nnodes=0", "give their number"),
        ("data.train_batch_size=32", False, "data.train_batch_size=32", "set it to 64"),
        ("trainer.v1.separate_async.parameter_sync_step=2", False, "parameter_sync_step=2", "set it to 32"),
        ("reward.reward_model.enable=True", False, "reward.reward_model.enable=True", "enable_resource_pool=True"),
        (f"{MICRO}=12", False, f"{MICRO}=12: each GPU computes 2 samples", "verl takes divisors of that"),
        (f"{MICRO}=3 actor_rollout_ref.rollout.n=8", False, f"{MICRO}=3", "16 samples in such micro-batches"),
    ],
)  # fmt: skip
def test_what_engines_of_their_own_cannot_do_is_refused_before_verl_asserts_it(switched, override, on_cpu, key, fix):
    _, _, problems = switched(*SEPARATE, *override.split(), on_cpu=on_cpu)
    assert len(problems) == 1, problems
    assert key in problems[0] and fix in problems[0]


@pytest.mark.parametrize(
    "overrides",
    [
        (f"{MICRO}=2",),
        (f"{MICRO}=8", "actor_rollout_ref.rollout.n=8"),
        (f"{MICRO}=12", "algorithm.rollout_correction.bypass_mode=True"),
        (f"{MICRO}=12", "actor_rollout_ref.actor.use_dynamic_bsz=True"),
        (f"{MICRO}=12", "trainer.n_gpus_per_node=5"),  # verl divides the samples in its own way
    ],
)
def test_micro_batches_that_divide_an_update_are_taken(switched, overrides):
    assert switched(*SEPARATE, *overrides)[2] == []


UPDATE = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu"
STEP = ("data.train_batch_size=24", "actor_rollout_ref.actor.ppo_mini_batch_size=8", "actor_rollout_ref.rollout.n=4",
        "trainer.n_gpus_per_node=2", f"{MICRO}=16", f"{UPDATE}=4")  # fmt: skip
"""48 samples of a step and 16 samples of an update on each of two GPUs."""


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ("", None),
        (f"{MICRO}=48", None),
        (f"{MICRO}=10", f"{MICRO}=10: each GPU computes 48 samples"),
        (f"{MICRO}=10 algorithm.rollout_correction.bypass_mode=True", None),
        (f"{MICRO}=10 algorithm.rollout_correction.bypass_mode=True actor_rollout_ref.actor.use_kl_loss=True", "MICRO=10"),
        (f"{MICRO}=10 trainer.n_gpus_per_node=5", None),  # verl refuses it by itself
        (f"{MICRO}=10 data.train_batch_size=20", None),  # verl fills the step up
        (f"{UPDATE}=3", f"{UPDATE}=3: each GPU computes 16 samples in such micro-batches, and verl takes divisors of that alone; set it to 1 "),
        (f"{UPDATE}=12", "set it to 4 or another one"),
        (f"{UPDATE}=3 actor_rollout_ref.actor.use_dynamic_bsz=True", None),
        (f"{UPDATE}=3 actor_rollout_ref.actor.use_dynamic_bsz=True {MICRO}=10", None),
        ("actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True", "set both to the same value"),
    ],
)  # fmt: skip
def test_micro_batches_divide_what_a_gpu_computes(switched, overrides, problem):
    problems = switched(*STEP, *overrides.split())[2]
    assert len(problems) == (problem is not None), problems
    assert problem is None or problem.replace("MICRO", MICRO) in problems[0]


def test_verls_assertions_on_separate_engines_are_the_ones_that_the_rules_know():
    import inspect

    from verl.trainer.ppo.v1 import PPOTrainerSeparateAsync
    from verl.workers.engine.utils import prepare_micro_batches

    source = inspect.getsource(PPOTrainerSeparateAsync.__init__)
    assert source.count("assert ") == 5  # batch size, nodes, GPUs, transport, reward model
    assert "assert total_data_size % (force_group_size * micro_batch_size_per_gpu) == 0" in inspect.getsource(
        prepare_micro_batches
    )


@pytest.mark.parametrize("estimator", [e.value for e in AdvantageEstimator])
def test_every_estimator_of_verls_runs_or_says_why_not(switched, estimator):
    _, _, problems = switched(f"algorithm.adv_estimator={estimator}")
    assert len(problems) == (estimator in rules.UNCOMPUTED), problems


def test_the_estimators_that_are_refused_cannot_run_in_verls_v1_trainer_either():
    """Fails when a new verl computes what they need."""
    v1 = Path(verl.__file__).parent / "trainer" / "ppo" / "v1"
    source = "\n".join(f.read_text() for f in v1.glob("*.py"))
    assert "reward_baselines" not in source and "sum_pi_squared" not in source
    fields = re.search(r"def _compute_advantage.*?fields = (\[.*?\])", source, re.S)[1]
    # gdpo's
    assert "rm_scores" in fields and "prompts" not in fields and "attention_mask" not in fields


@pytest.mark.parametrize(
    "key", ["actor.fsdp_config.ulysses_sequence_parallel_size", "actor.ulysses_sequence_parallel_size"]
)
def test_ulysses_without_flash_attn_is_refused(switched, key):
    """tests/engine/test_many_ranks.py has what Ulysses computes, with flash-attn's place taken, and
    what it would compute."""
    attention = "actor_rollout_ref.model.override_config.attn_implementation"
    chosen = [f"actor_rollout_ref.{key}=2", "actor_rollout_ref.model.use_remove_padding=True"]
    (problem,) = switched(*chosen, f"+{attention}=sdpa", on_cpu=False)[2]
    assert (
        f"attn_implementation=sdpa with actor_rollout_ref.{key}=2" in problem
        and f"or actor_rollout_ref.{key}=1" in problem
    )
    assert switched(*chosen, f"+{attention}=flash_attention_2", on_cpu=False)[2] == []
    assert len(switched(*chosen, f"+{attention}=flash_attention_2", on_cpu=True)[2]) == 1
    assert switched(*chosen, f"+{attention}=qerl_packed", on_cpu=False)[2] == []


def test_megatron_is_refused(switched):
    _, _, problems = switched("model_engine=megatron")
    assert any("strategy=megatron: QeRL trains with FSDP2; set model_engine=dp" in p for p in problems)


def test_several_problems_are_reported_together(switched):
    _, _, problems = switched("actor_rollout_ref.model.lora_rank=0", "actor_rollout_ref.rollout.name=sglang")
    assert len(problems) == 2


LORA = "actor_rollout_ref.model.lora"
RANK = "actor_rollout_ref.model.lora_rank"
CORRECTION = "algorithm.rollout_correction"
ADAPTIVE = ["qerl.aqn.schedule=adaptive", "qerl.aqn.target_kl=1e-3"]
LOG_PROBS = "actor_rollout_ref.rollout.calculate_log_probs=False"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        # settings of Megatron's, also with the value that they have anyway
        ([f"{LORA}.alpha=32"], f"{LORA}.alpha=32: that is Megatron's setting, which FSDP2 ignores; use actor_rollout_ref.model.lora_alpha"),
        ([f"{LORA}.rank=16"], "use actor_rollout_ref.model.lora_rank"),
        ([f"{LORA}.adapter_path=/a"], "use actor_rollout_ref.model.lora_adapter_path"),
        ([f"{LORA}.target_modules=[linear_qkv]"], "use actor_rollout_ref.model.target_modules"),
        ([f"{LORA}.exclude_modules=[a]"], "use actor_rollout_ref.model.exclude_modules"),
        ([f"{LORA}.dropout=0.1"], f"{LORA}.dropout=0.1: that is Megatron's setting, which FSDP2 ignores; remove it"),
        ([f"{LORA}.type=dora"], f"{LORA}.type=dora: that is Megatron's"),
        ([f"+{LORA}.fully_sharded_loras=True"], f"{LORA}.fully_sharded_loras=True: that is Megatron's"),
        (["algorithm.adv_estimator=gae", "critic.model.lora.alpha=8"], "use critic.model.lora_alpha"),
        # corrections need the rollout's log-probabilities
        ([LOG_PROBS], "calculate_log_probs=False: algorithm.rollout_correction works with"),
        ([LOG_PROBS, f"{CORRECTION}.bypass_mode=True"], "calculate_log_probs=False"),
        ([LOG_PROBS, f"{CORRECTION}.rollout_is=null", f"{CORRECTION}.rollout_rs=token_k1"], "calculate_log_probs=False"),
        ([LOG_PROBS, f"{CORRECTION}.rollout_is=null"], None),
        # so does sigma where it follows the divergence
        ([*ADAPTIVE, LOG_PROBS, f"{CORRECTION}.rollout_is=null"], "qerl.aqn.schedule=adaptive: sigma follows the divergence"),
        ([*ADAPTIVE, f"{CORRECTION}.bypass_mode=True"], "the actor's log-probabilities are not computed"),
        ([*ADAPTIVE, "qerl.aqn.enable=False", LOG_PROBS, f"{CORRECTION}.rollout_is=null"], None),
        (ADAPTIVE, None),
        ([f"{CORRECTION}.rollout_is=tokens"], f"{CORRECTION}.rollout_is=tokens: verl knows token and sequence"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_is_refused(switched, overrides, expected):
    problems = switched(*overrides)[2]
    assert len(problems) == (expected is not None), problems
    assert expected is None or expected in problems[0]


@pytest.mark.parametrize(
    ("overrides", "changed", "remarked"),
    [
        (["actor_rollout_ref.actor.optim.lr=1e-6"], [RANK], "optim.lr=1e-06 stays: LoRA takes"),
        (["actor_rollout_ref.actor.optim.lr=5e-6"], [RANK], None),
        (["actor_rollout_ref.actor.optim.lr=1e-6"], [], None),
        (["ray_kwargs.ray_init.runtime_env.py_executable=uv run"], [], "py_executable=uv run: Ray starts the workers"),
    ],
)
def test_what_may_not_be_meant_is_remarked_on(switched, overrides, changed, remarked):
    remarks = recipe.find_remarks(switched(*overrides)[0], changed)
    assert len(remarks) == (remarked is not None), remarks
    assert remarked is None or remarked in remarks[0]


@pytest.mark.parametrize(
    ("overrides", "remarked"),
    [
        ([], False),
        ([f"{CORRECTION}.rollout_is=null"], True),
        ([f"{CORRECTION}.rollout_is=null", "qerl.aqn.enable=False"], False),
        ([f"{CORRECTION}.bypass_mode=True"], False),
    ],
)
def test_noise_without_its_correction_is_remarked_on(switched, overrides, remarked):
    remarks = recipe.find_remarks(switched(*overrides)[0])
    assert [f"{CORRECTION}.rollout_is: null stays" in line for line in remarks] == [True] * remarked
