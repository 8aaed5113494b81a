"""`python -m verl.trainer.main_ppo` with the switch, in real processes: verl, Ray, vLLM.

Many tests look at two runs. The first trains PPO with a critic on verl's synchronous trainer,
validates, saves every step, and is killed while it saves the last one. The second starts from what
is left, the checkpoint of the step before beside half of another one, and goes on where the first
one was: under the GSM8K recipe with GRPO, a KL loss, settings of verl's example scripts, and the
trainer whose rollout has a slot of its own. What it must restore depends on none of these. A run in
the slow tier takes the GSM8K recipe with REINFORCE++, CISPO's loss and the colocated asynchronous
trainer through verl's own reward.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qerl_verl.aqn.schedule import AQNSchedule
from qerl_verl.compare.runs import Run
from qerl_verl.compare.settings import compare_settings, read_settings
from qerl_verl.config.settings import AQNSettings
from qerl_verl.data.prompts import write_parquet
from qerl_verl.quickstart.arithmetic import rows, split
from qerl_verl.trainer.checkpoints import find_damage, find_resumable, list_checkpoints
from tests.integration.killed_job import START_SECONDS, kill_at
from tests.integration.tiny_job import Job, checkpoint_differences

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3600)]

HERE = Path(__file__).parent
STEPS = 4
SAVED = STEPS - 1  # the last whole checkpoint
# of the actor; the warm-up begins with 0, so the first step changes nothing
LR, WARMUP = 2e-2, STEPS
SIGMA_START, SIGMA_END = 0.05, 0.02
COMMON = [
    "+qerl=nvfp4",
    f"qerl.aqn.num_stages={STEPS}",
    f"qerl.aqn.sigma_start={SIGMA_START}",
    f"qerl.aqn.sigma_end={SIGMA_END}",
    "data.train_batch_size=8",
    "data.max_prompt_length=32",
    "data.max_response_length=8",
    "actor_rollout_ref.model.lora_rank=8",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.max_model_len=64",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16",
    f"actor_rollout_ref.actor.optim.lr={LR}",
    f"actor_rollout_ref.actor.optim.lr_warmup_steps={WARMUP}",
    "critic.enable=True",
    "critic.model.lora_rank=8",
    "critic.optim.lr=1e-2",
    "critic.ppo_micro_batch_size_per_gpu=16",
    f"reward.custom_reward_function.path={HERE / 'digit_reward.py'}",
    "trainer.logger=[console,file]",
    f"trainer.total_training_steps={STEPS}",
    "trainer.total_epochs=10",
    "trainer.save_freq=1",
    f"trainer.test_freq={SAVED}",
]

FIRST = [
    "algorithm.adv_estimator=gae",
    "algorithm.use_kl_in_reward=True",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=32",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=32",
]

EXAMPLE_SCRIPTS = [
    "algorithm.adv_estimator=grpo",
    "qerl.base=separate",
    # what the first run left at verl's values and the recipe sets
    "actor_rollout_ref.model.lora_alpha=16",
    "actor_rollout_ref.rollout.val_kwargs.do_sample=False",
    "actor_rollout_ref.rollout.val_kwargs.temperature=0",
    "actor_rollout_ref.rollout.max_num_batched_tokens=2048",
    "actor_rollout_ref.actor.strategy=fsdp",
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.fsdp_config.param_offload=True",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
    "actor_rollout_ref.ref.fsdp_config.param_offload=True",
    "actor_rollout_ref.rollout.layered_summon=True",
]

# a step of the second run, each on one mini-batch; the first has two mini-batches in one update
UPDATES = 2
SEPARATE = [
    "trainer.v1.trainer_mode=separate_async",
    f"trainer.v1.separate_async.parameter_sync_step={UPDATES}",
    "actor_rollout_ref.hybrid_engine=False",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16",
]


def train(folder: Path, *overrides: str) -> tuple[dict[int, dict], str]:
    """Runs main_ppo in ``folder``. Returns metrics by step, and the log."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), "HYDRA_FULL_ERROR": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", *overrides],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    (folder / "log").write_text(result.stdout)
    assert result.returncode == 0, result.stdout[-6000:]
    metrics: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        metrics.setdefault(entry["step"], {}).update(entry["data"])
    return metrics, result.stdout


def validation(metrics: dict) -> float:
    (value,) = (v for k, v in metrics.items() if k.startswith("val-core/") and "/mean" in k)
    return value


@pytest.fixture(scope="module")
def common(tmp_path_factory, bf16_checkpoint):
    folder = tmp_path_factory.mktemp("main_ppo")
    training, held_out = split(seed=0, held_out=16)
    write_parquet(rows(training[:64]), folder / "train.parquet")
    write_parquet(rows(held_out), folder / "validation.parquet")
    return folder, [
        *COMMON,
        f"data.train_files={folder / 'train.parquet'}",
        f"data.val_files={folder / 'validation.parquet'}",
        f"actor_rollout_ref.model.path={bf16_checkpoint}",
        f"critic.model.path={bf16_checkpoint}",
        f"qerl.cache_dir={folder / 'cache'}",
    ]


@pytest.fixture(scope="module")
def first(common):
    """Checkpoints, metrics and log of a run that is killed in the middle of its last save, how it
    ended, and its checkpoints as they were in the middle of the update before."""
    folder, overrides = common
    checkpoints = folder / "first" / "checkpoints"
    own = [
        "actor_rollout_ref.model.external_lib=tests.integration.repeatable",
        f"trainer.default_local_dir={checkpoints}",
    ]
    own += [f"trainer.rollout_data_dir={folder / 'first' / 'samples'}"]
    own += [f"trainer.validation_data_dir={folder / 'first' / 'validation'}"]
    job = Job(folder / "first", [*overrides, *FIRST, *own], hold_folder=folder / "hold").start()
    try:
        job.hold("update", SAVED)
        job.wait_until(job.held, START_SECONDS, f"update of step {SAVED}")
        shutil.copytree(checkpoints, folder / "in_update")
        end = kill_at(job, "actor", "save", STEPS)
    finally:
        job.end()
    return checkpoints, job.metrics(), job.log.read_text(), end, folder / "in_update"


@pytest.fixture(scope="module")
def resumed(common, first):
    """Checkpoints, metrics and log of the second run, which takes the last step."""
    folder, overrides = common
    again = shutil.copytree(first[0], folder / "again")
    # as if it named the half checkpoint
    (again / "latest_checkpointed_iteration.txt").write_text(str(STEPS))
    recipe = ["--config-path=pkg://qerl_verl.recipes", "--config-name=gsm8k_grpo"]
    overrides = [o for o in overrides if o != "+qerl=nvfp4"]  # the recipe has the switch
    own = [f"trainer.default_local_dir={again}", f"trainer.rollout_data_dir={folder / 'resumed' / 'samples'}"]
    metrics, log = train(folder / "resumed", *recipe, *overrides, *EXAMPLE_SCRIPTS, *SEPARATE, *own)
    return again, metrics, log


def dumped(folder: Path, step: int, what: str) -> list[str]:
    """Returns ``input`` or ``output`` of the samples that verl wrote into ``folder`` at a step."""
    return [json.loads(line)[what] for line in (folder / f"{step}.jsonl").read_text().splitlines()]


SCHEDULE = AQNSchedule(AQNSettings(sigma_start=SIGMA_START, sigma_end=SIGMA_END, num_stages=STEPS), STEPS)


def test_trains_under_the_noise_schedule_and_logs_it(first):
    metrics = first[1]
    for step in range(1, STEPS):
        m = metrics[step]
        assert m["qerl/aqn_stage"] == step - 1 and m["qerl/aqn_sigma"] == pytest.approx(SCHEDULE.sigma(step))
        assert m["actor/entropy"] > 0 and m["actor/grad_norm"] > 0
        assert m["actor/lr"] == pytest.approx(LR * step / WARMUP)
    assert metrics[1]["qerl/aqn_sigma"] == 0 and metrics[2]["qerl/aqn_sigma"] == SIGMA_START


def test_rollout_and_training_agree_without_noise_and_part_with_it(first):
    """Both run the same NVFP4 base, so without noise a probability differs by bfloat16's rounding
    alone."""
    metrics = first[1]
    difference = {step: metrics[step]["training/rollout_probs_diff_mean"] for step in range(1, STEPS)}
    assert difference[1] < torch.finfo(torch.bfloat16).eps
    assert difference[2] > 2 * difference[1]  # sigma 0.05
    assert metrics[1]["rollout_corr/rollout_is_mean"] == pytest.approx(1.0, abs=0.05)


def test_the_noise_that_acts_and_the_policy_that_sampled_are_logged(first):
    """The tiny model's norm weights are 1, so both units say the same; 512 channels receive
    noise."""
    _, metrics, log, _, _ = first
    for step in range(1, STEPS):
        m = metrics[step]
        assert m["qerl/aqn_sigma_effective"] == pytest.approx(m["qerl/aqn_sigma"], rel=0.1)
        assert m["qerl/aqn_sigma_effective_relative"] == pytest.approx(m["qerl/aqn_sigma_effective_absolute"], rel=1e-3)
        assert m["qerl/sampling_entropy"] == pytest.approx(m["actor/entropy"], rel=0.5)
        assert m["qerl/sampling_kl"] == pytest.approx(m["rollout_corr/k3_kl"], rel=1e-3)
        assert 0 < m["qerl/effective_sample_size"] <= 1 and 0 <= m["qerl/truncated_weights"] < 1
    # the largest sigma against none
    assert metrics[2]["qerl/sampling_kl"] > 2 * metrics[1]["qerl/sampling_kl"]
    assert log.count("AQN on this model: the root mean square of a noised norm's weight is 1 (median; 1 to 1)") == 1


def test_the_run_leaves_its_settings_beside_its_metrics(first, common, bf16_checkpoint):
    """What `qerl compare` reads, and that Hydra's folder and what verl prints say the same."""
    folder = first[0].parent
    found = read_settings(folder / "metrics.jsonl", alone=False)
    assert found["model"] == str(bf16_checkpoint) and found["data.train_files"] == [str(common[0] / "train.parquet")]
    assert len(found["data.train_files.sha256"][0]) == 64 and found["qerl.arm"] == "nvfp4"
    printed = read_settings(folder / "log", alone=False)
    (hydra,) = folder.glob("outputs/*/*/.hydra")
    composed = read_settings(hydra.parent / "metrics.jsonl", alone=True)
    runs = [Run(name, folder, {}, [], s) for name, s in (("record", found), ("log", printed), ("hydra", composed))]
    agreement = compare_settings({"arm": runs})
    assert not agreement.unknown and not agreement.conflicts


def test_names_the_kernels_that_ran(first):
    log = first[2]
    assert "[qerl] kernel: actor NVFP4 linear = PyTorch" in log
    assert "[qerl] kernel: rollout NVFP4 linear = PyTorch" in log
    assert "[qerl] platform: cpu" in log


def test_the_rollouts_server_starts_while_the_actor_is_built(first):
    log = first[2]
    assert "[qerl] start: rollout servers that start beside the actor: 1" in log
    assert "not started ahead" not in log and "was started for" not in log


def test_actor_and_rollout_use_one_copy_of_the_base_and_a_resumed_run_may_have_two(first, resumed):
    log = first[2]
    (owned,) = set(re.findall(r"base: the actor uses the (\S+ GiB) on each device", log))
    assert f"base: the rollout uses {owned} of the actor's" in log
    assert "base: one copy for actor and rollout (qerl.base=auto)" in log and "in memory once" in log
    assert "base: a copy each in actor and rollout (qerl.base=separate)" in resumed[2]
    assert "base: the rollout uses" not in resumed[2] and "base: the actor uses" not in resumed[2]


def test_a_checkpoint_records_the_policy_and_the_users_model(first, resumed, bf16_checkpoint):
    for checkpoint in (first[0] / f"global_step_{SAVED}", resumed[0] / f"global_step_{STEPS}"):
        record = json.loads((checkpoint / "qerl_checkpoint.json").read_text())
        policy, model = record["policy"], "actor_rollout_ref.model"
        assert record["total_training_steps"] == STEPS and policy["qerl.aqn.sigma_start"] == SIGMA_START
        assert policy[f"{model}.lora_alpha"] > 0 and len(policy[f"{model}.target_modules"]) == 7
        adapter = json.loads((checkpoint / "actor" / "lora_adapter" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(bf16_checkpoint)
        assert "README.md" in {Path(name).name for name in record["files"]}


def test_a_checkpoint_is_small_and_its_adapter_is_pefts(first):
    from safetensors.torch import load_file

    actor = first[0] / f"global_step_{SAVED}" / "actor"
    state = torch.load(actor / "model_world_size_1_rank_0.pt", weights_only=False)
    assert state and all("lora_" in name for name in state)
    adapter = load_file(actor / "lora_adapter" / "adapter_model.safetensors")
    assert any(t.abs().max() > 0 for n, t in adapter.items() if "lora_B" in n)


def test_in_the_middle_of_an_update_the_checkpoint_before_is_there_untouched(first):
    checkpoints, _, _, _, in_update = first
    before, after = f"global_step_{SAVED - 1}", f"global_step_{SAVED}"
    assert {f.name for f in list_checkpoints(in_update)} == {f"global_step_{step}" for step in range(1, SAVED)}
    assert find_resumable(in_update, print) == in_update / before
    assert checkpoint_differences(in_update / before, checkpoints / before) == []
    assert checkpoint_differences(in_update / before, checkpoints / after) != []


def test_a_kill_in_the_middle_of_a_save_ends_the_job_and_leaves_the_checkpoint_before(first):
    checkpoints, metrics, _, end, _ = first
    half = checkpoints / f"global_step_{STEPS}"
    assert end["ended"].endswith("code 1") and end["outlived"] == [] and "WorkerDict" in end["named"]
    assert 0 < end["files"] < 10 and list((half / "actor").glob("optim_*"))
    assert find_damage(half) is not None
    assert find_resumable(checkpoints, print) == checkpoints / f"global_step_{SAVED}"
    assert max(metrics) == SAVED and metrics[SAVED]["actor/grad_norm"] > 0


def test_resuming_restores_adapter_optimizer_scheduler_data_and_noise(common, first, resumed):
    before = first[1]
    folder, after, _ = resumed
    assert [step for step in after if "actor/lr" in after[step]] == [STEPS]
    # greedy validation right after the resume is that of the first run: same adapter in the
    # rollout, no noise
    assert validation(after[SAVED]) == validation(before[SAVED])
    untrained, trained = (dumped(common[0] / "first" / "validation", step, "output") for step in (0, SAVED))
    assert len(trained) == 16 and trained != untrained
    assert after[STEPS]["qerl/aqn_sigma"] == SCHEDULE.sigma(STEPS) == SIGMA_END
    assert after[STEPS]["qerl/aqn_stage"] == STEPS - 1
    # the warm-up is over; without the scheduler's state it begins
    assert after[STEPS]["actor/lr"] == pytest.approx(LR)
    # an epoch has 8 steps, so what is new to the run is a prompt of no step before
    seen = {prompt for step in range(1, STEPS) for prompt in dumped(common[0] / "first" / "samples", step, "input")}
    now = set(dumped(common[0] / "resumed" / "samples", STEPS, "input"))
    assert len(seen) == 8 * SAVED and len(now) == 8 and not seen & now
    for checkpoints, step, updates in ((first[0], SAVED, SAVED), (folder, STEPS, SAVED + UPDATES)):
        actor = checkpoints / f"global_step_{step}" / "actor"
        optimizer = torch.load(actor / "optim_world_size_1_rank_0.pt", weights_only=False)
        # two mini-batches a step
        assert {int(s["step"]) for s in optimizer["state"].values()} == {2 * step}
        extra = torch.load(actor / "extra_state_world_size_1_rank_0.pt", weights_only=False)
        assert extra["lr_scheduler"]["last_epoch"] == updates


def test_actors_that_verl_ends_are_not_called_lost(resumed):
    """``separate_async`` has the most of them."""
    assert "[qerl] resuming from" in resumed[2] and "lost a process" not in resumed[2]


def test_a_half_checkpoint_is_passed_over(resumed):
    folder, _, log = resumed
    assert f"{folder / f'global_step_{STEPS}'} is passed over: " in log
    assert f"resuming from {folder / f'global_step_{SAVED}'}" in log


def test_grpo_and_a_kl_loss_run_under_the_settings_of_verls_example_scripts(resumed):
    _, metrics, log = resumed
    assert metrics[STEPS]["actor/grad_norm"] > 0
    assert metrics[STEPS]["actor/kl_loss"] > 0  # the reference is the base without the adapter
    assert metrics[STEPS]["critic/advantages/min"] < 0 < metrics[STEPS]["critic/advantages/max"]
    assert log.count("[qerl] kernel: actor NVFP4 linear") == 1  # and no second model
    assert "[qerl] actor_rollout_ref.actor.strategy: fsdp -> fsdp2" in log


def test_the_second_run_takes_the_checkpoint_from_the_cache(common, resumed):
    entries = [p for p in (common[0] / "cache").iterdir() if p.is_dir()]
    assert len(entries) == 1 and f"[qerl] model: {entries[0]}" in resumed[2]


def test_ppo_trains_a_critic_on_the_actors_checkpoint(common, first):
    _, metrics, log, _, _ = first
    for step in range(1, STEPS):
        m = metrics[step]
        assert m["critic/grad_norm"] > 0 and m["critic/lr"] == pytest.approx(1e-2) and m["actor/grad_norm"] > 0
        assert m["critic/vf_loss"] > 0
    # adapter and head are on
    assert abs(metrics[2]["critic/values/mean"] - metrics[1]["critic/values/mean"]) > 0.05
    shared = re.findall(r"base: the (\w+) uses the (\S+) GiB on each device that are shared", log)
    assert {role for role, _ in shared} == {"actor", "critic"} and len({size for _, size in shared}) == 1
    assert "[qerl] kernel: critic NVFP4 linear" in log and "[qerl] critic: the same checkpoint" in log
    assert len([p for p in (common[0] / "cache").iterdir() if p.is_dir()]) == 1


def test_the_reference_is_the_actor_without_its_adapter(first):
    """Before the first update the adapter adds nothing, so the penalty is 0; and no second actor
    was built."""
    _, metrics, log, _, _ = first
    assert metrics[1]["actor/reward_kl_penalty"] == 0 and metrics[SAVED]["actor/reward_kl_penalty"] != 0
    assert log.count("[qerl] kernel: actor NVFP4 linear") == 1


def critic_weights(checkpoint: Path, which: str) -> torch.Tensor:
    """Returns the adapter (``lora_B``) or head (``score``) of a checkpoint's critic, as one
    vector."""
    found = []
    for name in ("model", "value_head"):
        tensors = torch.load(checkpoint / "critic" / f"{name}_world_size_1_rank_0.pt", weights_only=False)
        found += [t.to_local() if hasattr(t, "to_local") else t for n, t in sorted(tensors.items()) if which in n]
    return torch.cat([t.float().flatten() for t in found])


@pytest.mark.parametrize("which", ["lora_B", "score"])
def test_a_resumed_critic_goes_on_from_what_the_first_run_learned(first, resumed, which):
    """It is two updates away from the last checkpoint, and six from the first."""
    begun, saved = (critic_weights(first[0] / f"global_step_{step}", which) for step in (1, SAVED))
    now = critic_weights(resumed[0] / f"global_step_{STEPS}", which)
    assert 0 < (now - saved).norm() < 0.6 * (now - begun).norm()


def test_resuming_restores_the_critics_optimizer_and_scheduler(first, resumed):
    for checkpoints, step, updates in ((first[0], SAVED, SAVED), (resumed[0], STEPS, SAVED + UPDATES)):
        critic = checkpoints / f"global_step_{step}" / "critic"
        head = torch.load(critic / "value_head_world_size_1_rank_0.pt", weights_only=False)
        optimizer = torch.load(critic / "optim_world_size_1_rank_0.pt", weights_only=False)
        assert len(head) == 2 and {int(s["step"]) for s in optimizer["state"].values()} == {2 * step}
        extra = torch.load(critic / "extra_state_world_size_1_rank_0.pt", weights_only=False)
        assert extra["lr_scheduler"]["last_epoch"] == updates


def test_an_engine_of_its_own_samples_under_the_adapter_and_the_noise_of_the_step(first, resumed):
    """Its samples have the step's own noise, and part from the actor by what that noise does in the
    colocated run."""
    before, after = first[1], resumed[1][STEPS]
    assert after["qerl/aqn_sigma"] == SIGMA_END
    assert [after[f"qerl/aqn_sigma_of_samples/{what}"] for what in ("min", "max")] == [SIGMA_END, SIGMA_END]
    assert after["qerl/aqn_sigma_effective"] == pytest.approx(SIGMA_END, rel=0.1)
    assert after["training/off_policy/trajectory_staleness_worst/max"] == 0
    apart = "training/rollout_probs_diff_mean"
    # sigma: 0, SIGMA_END, SIGMA_START
    assert before[1][apart] < after[apart] < 2 * before[2][apart]
    assert 0 <= validation(after) <= 1
    assert "checkpoint_engine.backend: naive -> qerl" in resumed[2]


GSM8K = [
    {"question": f"Ann has {a} apples and buys {b} more. How many has she?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"}
    for a, b in ((3, 4), (10, 2), (6, 6), (8, 1))
]


@pytest.mark.slow
def test_the_gsm8k_recipe_runs_through_verls_own_reward(tmp_path, bf16_checkpoint):
    raw = tmp_path / "raw"
    raw.mkdir()
    if os.environ.get("QERL_GSM8K"):
        raw = Path(os.environ["QERL_GSM8K"])
    else:
        for name in ("train", "test"):
            (raw / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    data = tmp_path / "data"
    subprocess.run(
        [sys.executable, "-m", "qerl_verl.data.gsm8k", "--out", data, "--local-dir", raw], check=True, timeout=120
    )
    metrics, _ = train(
        tmp_path / "run",
        "--config-path=pkg://qerl_verl.recipes",
        "--config-name=gsm8k_grpo",
        "algorithm.adv_estimator=reinforce_plus_plus",
        "actor_rollout_ref.actor.policy_loss.loss_mode=cispo",
        f"actor_rollout_ref.model.path={bf16_checkpoint}",
        f"qerl.cache_dir={tmp_path / 'cache'}",
        f"data.train_files={data / 'train.parquet'}",
        f"data.val_files={data / 'test.parquet'}",
        "data.train_batch_size=4",
        "data.val_max_samples=4",
        "data.max_prompt_length=400",
        "data.max_response_length=16",
        "actor_rollout_ref.rollout.max_model_len=448",
        "actor_rollout_ref.rollout.max_num_batched_tokens=2048",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "trainer.n_gpus_per_node=1",
        "trainer.logger=[console,file]",
        "trainer.total_training_steps=2",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        "trainer.v1.trainer_mode=colocate_async",
    )
    assert {1, 2} <= set(metrics)
    # the second step trains on samples that were drawn ahead, in the first, which has no noise
    assert metrics[2]["training/off_policy/trajectory_staleness_worst/max"] == 1
    assert metrics[2]["qerl/aqn_sigma_of_samples/min"] == 0 < metrics[2]["qerl/aqn_sigma"]
    assert metrics[1]["qerl/aqn_sigma_of_samples/max"] == 0
    assert all(0 <= metrics[s]["critic/score/mean"] <= 1 for s in (1, 2))
    assert metrics[2]["qerl/aqn_sigma"] > 0 and metrics[2]["actor/grad_norm"] >= 0
    assert any(k.startswith("val-core/openai/gsm8k/") for m in metrics.values() for k in m)
