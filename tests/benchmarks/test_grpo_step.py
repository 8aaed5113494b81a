"""Tests what bench_grpo_step.py runs and what it keeps of the output."""

import itertools
import json
import sys
from types import SimpleNamespace

import bench_grpo_step
import pytest
import result_file
from bench_grpo_step import Start, case_of, command, save_tokenizer
from omegaconf import OmegaConf

CASES = [("7B", False), ("7B", True), ("32B", False)]


@pytest.mark.parametrize(
    ("variant", "shape", "long"), [(v, *case) for v, case in itertools.product(("bf16_lora", "nvfp4_lora"), CASES)]
)
def test_a_command_composes(variant, shape, long, tmp_path):
    from qerl_verl.cli.explain import compose

    case = case_of(shape, long)
    line = command(variant, tmp_path, case, 3, ["data.seed=3"])
    config = compose("ppo_trainer", line[3:])
    assert config.data.max_response_length == case.response and config.data.seed == 3
    sequences = case.prompts * case.samples
    assert sequences * (case.prompt + case.response) == {False: 128 * 768, True: 64 * 4096}[long]
    actor = config.actor_rollout_ref.actor
    assert actor.use_dynamic_bsz or sequences % actor.ppo_micro_batch_size_per_gpu == 0


def test_bypass_mode_acts_from_its_step_on(monkeypatch):
    import bypass_steps

    class Trainer:
        config = OmegaConf.create({"algorithm": {"rollout_correction": {"bypass_mode": False}}})

        def refill(self):
            pass

    trainer, seen = Trainer(), []
    OmegaConf.set_struct(trainer.config, True)
    monkeypatch.setattr(bypass_steps.ReplayBuffer, "sample", lambda self, **given: given)
    buffer = bypass_steps.BypassSteps(
        trainer_mode="sync",
        trainer_config=OmegaConf.create({}),
        max_off_policy_threshold=None,
        max_off_policy_strategy="drop",
        sampler_kwargs=OmegaConf.create({"bypass_from": 3}),
        refill_fn=trainer.refill,
    )
    for step in range(1, 5):
        given = buffer.sample(global_steps=step, partition_id="train", batch_size=4)
        assert given == {"global_steps": step, "partition_id": "train", "batch_size": 4}
        seen.append(trainer.config.algorithm.rollout_correction.bypass_mode)
    assert seen == [False, False, True, True]


def test_verls_trainer_passes_its_own_method_and_reads_bypass_mode_in_each_step():
    """Where verl changes this, bypass_steps.py has to."""
    import inspect

    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    assert "refill_fn=self._add_prompts_to_generate" in inspect.getsource(PPOTrainer._build_replay_buffer)
    for name in ("_compute_old_log_prob", "_compute_advantage"):
        assert 'self.config.algorithm.get("rollout_correction"' in inspect.getsource(getattr(PPOTrainer, name))


def test_the_tokenizer_has_the_models_size_and_no_added_tokens(tmp_path):
    from transformers import AutoTokenizer

    own = save_tokenizer(tmp_path, 1024)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert len(read) == read.vocab_size == 1024
    text = "<|im_start|>user\nabc xyz<|im_end|>"
    assert read(text)["input_ids"] == own(text)["input_ids"]


LOG = """\x1b[36m(TaskRunner pid=7)\x1b[0m hello
\x1b[36m(TaskRunner pid=7)\x1b[0m [qerl] kernel: actor NVFP4 linear = Hopper
\x1b[36m(vLLMHttpServer pid=9)\x1b[0m (EngineCore pid=11) INFO 11-27 [gpu.py:1] Model loading took 5.2 GiB and 3.7 seconds
(TaskRunner pid=7) step:1 - timing_s/step:30.0 - timing_s/gen:9.0
(WorkerDict pid=8) late
(TaskRunner pid=7) step:2 - timing_s/step:20.0 - timing_s/gen:5.0 - timing_s/old_log_prob:4.0
(TaskRunner pid=7) step:3 - timing_s/step:22.0 - timing_s/gen:7.0 - timing_s/old_log_prob:4.0
(TaskRunner pid=7) step:4 - timing_s/step:16.0 - timing_s/gen:6.0
(TaskRunner pid=7) step:5 - timing_s/step:18.0 - timing_s/gen:6.0
"""


def test_the_start_of_a_run_is_described():
    start = Start()
    for number, line in enumerate(LOG.splitlines()):
        start.see(10.0 * number, line)
    found = start.describe()
    assert found["first_line_of_process"] == {"TaskRunner": 0.0, "vLLMHttpServer": 20.0}
    assert [seconds for seconds, _ in found["messages"]] == [10.0, 20.0]
    assert "\x1b" not in found["messages"][1][1] and found["first_step_ended"] == 30.0


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs bench_grpo_step.py on a command that prints lines; returns its exit code and its
    file."""
    monkeypatch.setattr(result_file, "describe_machine", lambda gpu: dict.fromkeys(result_file.CONDITIONS, "the same"))
    monkeypatch.setattr(bench_grpo_step, "subprocess", SimpleNamespace(**vars(bench_grpo_step.subprocess)))
    monkeypatch.setattr(bench_grpo_step.subprocess, "run", lambda *line, **settings: None)
    path = tmp_path / "x.json"

    def call(*arguments, code):
        monkeypatch.setattr(bench_grpo_step, "command", lambda *rest: [sys.executable, "-c", code])
        monkeypatch.setattr(sys, "argv", ["x", *arguments, "--work", str(tmp_path / "w"), "--json", str(path)])
        with pytest.raises(SystemExit) as ended:
            bench_grpo_step.main()
        return ended.value.code, json.loads(path.read_text())

    return call


def test_steps_in_bypass_mode_are_a_run_of_their_own(bench):
    code, found = bench("--bypass", code=f"print({LOG!r})")
    assert code == 0 and "incomplete" not in found and found["cut_off"] == {}
    runs = found["runs"]
    assert list(runs) == ["bf16_lora", "bf16_lora_bypass", "nvfp4_lora", "nvfp4_lora_bypass"]
    assert (
        runs["nvfp4_lora"]["mean"]["timing_s/step"] == 21.0
        and runs["nvfp4_lora_bypass"]["mean"]["timing_s/step"] == 17.0
    )
    assert list(runs["nvfp4_lora"]["steps"]) == ["1", "2", "3"] and list(runs["nvfp4_lora_bypass"]["steps"]) == [
        "4",
        "5",
    ]
    assert found["ratio_to_bf16_lora"]["nvfp4_lora_bypass"]["timing_s/step"] == pytest.approx(21 / 17)
    assert found["ratio_to_bf16_lora_bypass"]["nvfp4_lora_bypass"]["timing_s/step"] == 1.0
    assert runs["nvfp4_lora"]["start"]["first_step_ended"] is not None


def test_a_run_that_dies_leaves_its_steps(bench):
    code, found = bench("--variants", "nvfp4_lora", code=f"print({LOG!r}); raise SystemExit(3)")
    assert code == 1 and found["incomplete"] == "without nvfp4_lora" and found["runs"] == {}
    assert found["failed"] == {"nvfp4_lora": "ended with exit code 3 after 5 steps"}
    assert found["cut_off"]["nvfp4_lora"]["steps"]["2"]["timing_s/step"] == 20.0


def test_no_variant_starts_when_the_budget_is_over(bench):
    code, found = bench("--budget", "-1", code="")
    assert code == 1 and set(found["failed"]) == {"bf16_lora", "nvfp4_lora"}
