"""Tests when the trainer applies and removes noise, with a trainer that follows verl's order of
hooks.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

from qerl_verl.config.settings import QeRLSettings
from qerl_verl.job import Job
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.trainer import noise
from qerl_verl.trainer.noise import NoiseMixin
from qerl_verl.trainer.resume import WholeCheckpointsMixin
from tests.helpers.rollout_servers import Manager

TOTAL = 4


class Base:
    """Makes the calls of verl/trainer/ppo/v1/trainer_base.py, fit(), in its order, without the
    work.
    """

    staleness = 0
    measured = {}  # by step, what came of its samples

    def __init__(self, config):
        self.config = config
        self.checkpoint_callback = None
        self.total_training_steps = TOTAL
        self.events = []

    def on_train_begin(self):
        self.events.append("train")

    def _setup(self):
        self.checkpoint_manager = Manager(self.events)

    def on_validate_begin(self):
        self.events.append("validate")

    def on_validate_end(self):
        self.events.append("validated")

    def step(self, metrics, timing_raw):
        self.events.append(f"step {self.global_steps}")
        newest = self.global_steps - 1 - self.staleness
        sample = {"min_global_steps": max(0, newest - self.staleness), "max_global_steps": max(0, newest)}
        metrics |= self.measured.get(self.global_steps, {})
        return SimpleNamespace(tags=[sample, {"is_padding": True, "min_global_steps": 0, "max_global_steps": 0}])

    def fit(self, first_step):
        self._setup()
        self.checkpoint_manager.update_weights(first_step - 1)
        self.on_train_begin()
        self.logged = {}
        for self.global_steps in range(first_step, TOTAL + 1):
            metrics = {}
            assert self.step(metrics, {}).tags
            self.logged[self.global_steps] = metrics
            self.checkpoint_manager.update_weights(self.global_steps)
            if self.global_steps == 2:
                self.on_validate_begin()
                # a colocated reward model syncs in the middle of validation
                self.checkpoint_manager.update_weights()
                self.on_validate_end()


class Trainer(NoiseMixin, WholeCheckpointsMixin, Base):
    pass


def make_trainer(**aqn):
    aqn = {"sigma_start": 0.04, "sigma_end": 0.01, "num_stages": 4, "seed": 6, **aqn}
    config = OmegaConf.create({"trainer": {}, "qerl": {"source_models": {"actor": "somewhere"}}})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in Job(QeRLSettings.from_mapping({"aqn": aqn})).environment().items():
            patch.setenv(name, value)
        return Trainer(config)


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda futures: futures)
    monkeypatch.setattr(ray, "wait", lambda futures, num_returns, timeout: (futures, []))
    return make_trainer()


def test_each_sync_brings_the_noise_of_the_next_step_and_validation_is_clean(trainer):
    trainer.fit(first_step=1)
    noise = {1: (6, 1, 0.0), 2: (6, 2, 0.04), 3: (6, 3, 0.02), 4: (6, 4, 0.01)}
    assert trainer.events == [
        *("sync 0", noise[1], "clear", "train", "step 1"),
        *("sync 1", noise[2], "clear", "step 2"),
        *("sync 2", noise[3], "clear"),
        *("validate", (6, 3, 0.0), "clear", "sync None", noise[3], "clear", "validated"),
        "step 3",
        *("sync 3", noise[4], "clear", "step 4"),
        *("sync 4", noise[4], "clear"),
    ]


def test_a_resumed_run_has_the_noise_of_its_step_from_the_start(trainer):
    trainer.fit(first_step=3)
    assert trainer.events[:5] == ["sync 2", (6, 3, 0.02), "clear", "train", "step 3"]


def test_metrics_tell_the_noise_that_the_step_sampled_under(trainer):
    trainer.fit(first_step=1)
    assert {s: m["qerl/aqn_stage"] for s, m in trainer.logged.items()} == {1: 0, 2: 1, 3: 2, 4: 3}
    assert [round(m["qerl/aqn_sigma"], 6) for m in trainer.logged.values()] == [0.0, 0.04, 0.02, 0.01]


def test_metrics_tell_the_noise_that_acts_in_the_engines(trainer):
    trainer.fit(first_step=1)
    for unit, factor in (("", 0.99), ("_absolute", 0.99), ("_relative", 1.98)):
        found = [m[f"qerl/aqn_sigma_effective{unit}"] for m in trainer.logged.values()]
        assert found == pytest.approx([factor * m["qerl/aqn_sigma"] for m in trainer.logged.values()])


def test_without_noise_the_engines_are_told_nothing(trainer):
    """The norms are vLLM's own then, and could not take noise."""
    trainer.qerl_settings = replace(trainer.qerl_settings, aqn=replace(trainer.qerl_settings.aqn, enable=False))
    trainer.fit(first_step=1)
    assert not [e for e in trainer.events if e == "clear" or isinstance(e, tuple)]
    assert not any("effective" in key for metrics in trainer.logged.values() for key in metrics)


def test_the_size_of_the_noise_on_this_model_is_told_once(trainer, capsys):
    trainer.fit(first_step=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "AQN on this model" in line]
    assert "sigma is 0.04 in the first noisy stage (8 % of the median norm's) and 0.01 in the last (2 %" in line


KL = "qerl/sampling_kl"


def adaptive(**measured):
    """Returns a trainer whose samples show the given divergences, by step."""
    trainer = make_trainer(schedule="adaptive", target_kl=1e-3, sigma_start=0.04, sigma_end=0.001)
    trainer.measured = {int(step[1:]): {KL: kl} for step, kl in measured.items()}
    return trainer


def test_an_adaptive_sigma_follows_the_divergence_of_the_samples(trainer):
    trainer = adaptive(s1=1e-3 / 1.21, s2=4e-3, s3=1e-3 * 1.21**2)
    trainer.fit(first_step=1)
    sigmas = [m["qerl/aqn_sigma"] for m in trainer.logged.values()]
    # lower than sigma_end it does not get
    assert sigmas == pytest.approx([0.001, 0.0011, 0.001, 0.001])
    assert [e[2] for e in trainer.events if isinstance(e, tuple) and e[2]][-1] == round(sigmas[3], 6)
    assert "qerl/aqn_stage" not in trainer.logged[1]


def test_an_adaptive_sigma_is_measured_against_what_stale_samples_were_drawn_under(trainer):
    """At step 3 the samples are from step 1 and before, which had sigma_end, although sigma has
    grown since.
    """
    trainer = adaptive(s1=1e-5, s2=1e-5, s3=1e-3)
    trainer.staleness = 2
    trainer.fit(first_step=1)
    assert trainer.logged[2]["qerl/aqn_sigma"] == pytest.approx(0.0015)
    assert trainer.logged[4]["qerl/aqn_sigma"] == pytest.approx(0.001)


def test_an_adaptive_sigma_is_part_of_the_checkpoint(trainer, tmp_path, monkeypatch, capsys):
    """A run that is resumed at step 2 has the sigmas of one that was not interrupted."""
    recorded = []
    monkeypatch.setattr(WholeCheckpointsMixin, "_after_save", lambda self, folder: recorded.append(sorted(
        p.name for p in folder.iterdir())))  # fmt: skip
    measured = {"s1": 5e-4, "s2": 7e-4, "s3": 3e-3}
    whole = adaptive(**measured)
    whole.fit(first_step=1)
    first = adaptive(s1=5e-4, s2=7e-4)
    first.total_training_steps = 2
    first._setup()
    for first.global_steps in (1, 2):
        first.step({}, {})
    first._after_save(tmp_path)
    assert recorded == [[noise.NOISE_FILE]]  # before the record is written, which lists it
    resumed = adaptive(**measured)
    resumed._resume_own_state(tmp_path)
    resumed.fit(first_step=3)
    for step in (3, 4):
        assert resumed.logged[step]["qerl/aqn_sigma"] == whole.logged[step]["qerl/aqn_sigma"]
    assert resumed.logged[3]["qerl/aqn_sigma"] != adaptive().aqn_schedule.sigma(3)
    (tmp_path / noise.NOISE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=f"{noise.NOISE_FILE}.*Restore it"):
        adaptive()._resume_own_state(tmp_path)
    (tmp_path / noise.NOISE_FILE).unlink()
    adaptive()._resume_own_state(tmp_path)
    assert f"has no {noise.NOISE_FILE}" in capsys.readouterr().out


def nested(*rows):
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ({"rollout_is": "token", "rollout_is_threshold": 2.0}, {"entropy", "kl", "effective_sample_size", "truncated"}),
        ({"rollout_is": None}, {"entropy", "kl", "effective_sample_size"}),
        ({"bypass_mode": True}, {"entropy"}),
        (None, {"entropy", "kl", "effective_sample_size"}),
    ],
)
def test_the_samples_own_log_probabilities_are_measured(trainer, monkeypatch, correction, expected):
    """Only samples count: the third row fills up the batch."""
    fields = {
        "rollout_log_probs": nested([-1.0, -2.0, -3.0], [-2.0], [-50.0]),
        "old_log_probs": nested([-1.0, -2.0, -3.0], [-1.0], [-1.0]),
        "response_mask": nested([1, 1, 0], [1], [1]),
    }

    def get(keys, partition_id, select_fields):
        return TensorDict({name: fields[name] for name in select_fields}, batch_size=len(keys))

    monkeypatch.setattr(noise.tq, "kv_batch_get", get)
    settings = {"actor_rollout_ref": {"rollout": {"calculate_log_probs": True}}}
    trainer.config = OmegaConf.create(settings | {"algorithm": {"rollout_correction": correction}})
    batch = SimpleNamespace(keys=["a", "b", "c"], partition_id="train", tags=[{}, {}, {"is_padding": True}])
    found = trainer._measure_samples(batch)
    assert set(found) == {noise.SAMPLE_METRICS[name] for name in expected}
    assert found["qerl/sampling_entropy"] == pytest.approx(5 / 3)
    if "kl" in expected:
        assert found["qerl/sampling_kl"] == pytest.approx((math.e - 2) / 3)
    if "truncated" in expected:
        assert found["qerl/truncated_weights"] == pytest.approx(1 / 3)
    trainer.config.actor_rollout_ref.rollout.calculate_log_probs = False
    assert trainer._measure_samples(batch) == {}


def test_the_metrics_of_samples_are_averages_over_the_updates_of_a_step():
    """verl's aggregator, which ``separate_async`` uses, decides by parts of a metric's name."""
    from verl.trainer.ppo.v1.utils import MetricsAggregator

    assert {MetricsAggregator()._get_aggregation_type(name) for name in noise.SAMPLE_METRICS.values()} == {
        "weighted_avg"
    }


def test_metrics_tell_the_noise_that_stale_samples_were_drawn_under(trainer):
    """The samples are from two steps ago, begun one step earlier: at step 3 they have the noise of
    steps 2 and 1.
    """
    trainer.staleness = 1
    trainer.fit(first_step=1)
    of_samples = {s: {k.rpartition("/")[2]: round(v, 6) for k, v in m.items() if "of_samples" in k}
                  for s, m in trainer.logged.items()}  # fmt: skip
    assert of_samples[3] == {"mean": 0.02, "min": 0.0, "max": 0.04}
    assert of_samples[4] == {"mean": 0.03, "min": 0.02, "max": 0.04}
    assert round(trainer.logged[4]["qerl/aqn_sigma"], 6) == 0.01


def test_the_first_validation_does_not_wait_for_prompts_that_a_resumed_run_has_yet_to_issue(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "_wait_for_samples_in_flight", lambda: trainer.events.append("waited"))
    trainer._setup()
    trainer.on_validate_begin()
    assert "waited" not in trainer.events
    trainer.on_validate_end()
    trainer.on_train_begin()
    trainer.on_validate_begin()
    assert trainer.events.index("waited") < len(trainer.events) - 1  # before the noise goes


def test_every_replica_is_told(trainer):
    trainer.fit(first_step=1)
    first, second = (r.server_handle for r in trainer.checkpoint_manager.replicas)
    assert second.events == [e for e in trainer.events if e == "clear" or isinstance(e, tuple)]
    assert first is not second
