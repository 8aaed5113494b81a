"""Tests when the trainer applies and removes noise, with a trainer that follows verl's order of
hooks.
"""

import inspect
import logging
import math
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.checkpoint_engine import base as verl_checkpoint_engine
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode
from verl.workers.config import CheckpointEngineConfig

from qerl_verl.aqn.schedule import AQNSchedule
from qerl_verl.config.rules import TRANSPORT
from qerl_verl.engine.detached import AdapterDetachWorker
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.rollout.register import register_transport
from qerl_verl.trainer import ppo, weight_sync
from qerl_verl.trainer.ppo import (
    AQNTrainerMixin,
    QeRLTrainerColocateAsync,
    QeRLTrainerSeparateAsync,
    QeRLTrainerSync,
)
from qerl_verl.trainer.resume import WholeCheckpointsMixin
from qerl_verl.trainer.run_length import RunLengthMixin
from qerl_verl.trainer.run_record import RunRecordMixin

TOTAL = 4


class Server:
    """Stands for the Ray actor of a rollout server, and records what reaches the engine."""

    def __init__(self, events):
        self.events = events
        self.qerl_set_noise = SimpleNamespace(remote=self._set_noise)
        self.qerl_check_engine = SimpleNamespace(remote=lambda: events.append("alive"))
        self.clear_kv_cache = SimpleNamespace(remote=lambda: events.append("clear"))

    def _set_noise(self, seed, step, sigma, unit, rounding, router):
        assert unit == "absolute"
        self.events.append((seed, step, round(sigma, 6)))
        # what the engine finds in its weights, not what the schedule asked for
        acting = 0.99 * sigma
        return [
            {"absolute": acting, "relative": 2 * acting, "weight_min": 0.1, "weight_median": 0.5, "weight_max": 2.0}
        ]


class Manager:
    backend = "naive"

    def __init__(self, events):
        self.events = events
        self.replicas = [SimpleNamespace(server_handle=Server(events)), SimpleNamespace(server_handle=Server([]))]

        self.actor_wg = SimpleNamespace(update_weights=self._send)

    def _send(self, global_steps, mode):
        assert mode == "naive"
        self.events.append(f"sync {global_steps}")
        return ["rank 0", "rank 1"]


class Base:
    """Makes the calls of verl/trainer/ppo/v1/trainer_base.py, fit(), in its order, without the
    work.
    """

    staleness = 0
    measured = {}  # by step, what came of its samples

    def __init__(self, config):
        assert config.trainer.v1.trainer_mode == "sync"
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


class Trainer(AQNTrainerMixin, Base):
    verl_mode = "sync"


def make_trainer(**aqn):
    aqn = {"sigma_start": 0.04, "sigma_end": 0.01, "num_stages": 4, "seed": 6, **aqn}
    config = {
        "trainer": {"v1": {"trainer_mode": "qerl_sync"}},
        "qerl": {"aqn": aqn, "source_models": {"actor": "somewhere"}},
    }
    return Trainer(OmegaConf.create(config))


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
    assert recorded == [[ppo.NOISE_FILE]]  # before the record is written, which lists it
    resumed = adaptive(**measured)
    resumed._resume_own_state(tmp_path)
    resumed.fit(first_step=3)
    for step in (3, 4):
        assert resumed.logged[step]["qerl/aqn_sigma"] == whole.logged[step]["qerl/aqn_sigma"]
    assert resumed.logged[3]["qerl/aqn_sigma"] != adaptive().aqn_schedule.sigma(3)
    (tmp_path / ppo.NOISE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=f"{ppo.NOISE_FILE}.*Restore it"):
        adaptive()._resume_own_state(tmp_path)
    (tmp_path / ppo.NOISE_FILE).unlink()
    adaptive()._resume_own_state(tmp_path)
    assert f"has no {ppo.NOISE_FILE}" in capsys.readouterr().out


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

    monkeypatch.setattr(ppo.tq, "kv_batch_get", get)
    settings = {"actor_rollout_ref": {"rollout": {"calculate_log_probs": True}}}
    trainer.config = OmegaConf.create(settings | {"algorithm": {"rollout_correction": correction}})
    batch = SimpleNamespace(keys=["a", "b", "c"], partition_id="train", tags=[{}, {}, {"is_padding": True}])
    found = trainer._measure_samples(batch)
    assert set(found) == {ppo.SAMPLE_METRICS[name] for name in expected}
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

    assert {MetricsAggregator()._get_aggregation_type(name) for name in ppo.SAMPLE_METRICS.values()} == {"weighted_avg"}


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


@pytest.mark.parametrize("trainer", [QeRLTrainerColocateAsync, QeRLTrainerSeparateAsync])
def test_an_asynchronous_trainer_validates_when_nothing_is_being_sampled_for_training(monkeypatch, trainer):
    """Otherwise the samples of the next step would be drawn without noise."""
    running = {"is_prompt": True, "status": "running"}
    answers = [{"a": running, "a_0_0": {"status": "success"}}, {"a": {**running, "status": "finished"}, "b": running}]
    answers = [{"train": a} for a in answers] + [{"train": {"b": {**running, "status": "failure"}}}]
    monkeypatch.setattr(ppo.tq, "kv_list", lambda partition: answers.pop(0))
    monkeypatch.setattr(ppo.time, "sleep", lambda seconds: None)
    trainer._wait_for_samples_in_flight(None)
    assert answers == []


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


def test_the_manager_passes_everything_else_through(trainer):
    trainer._setup()
    assert trainer.checkpoint_manager.backend == "naive"
    assert len(trainer.checkpoint_manager.replicas) == 2
    assert isinstance(trainer.aqn_schedule, AQNSchedule)


def test_a_sync_whose_engine_has_died_ends_instead_of_waiting_for_ever(trainer, monkeypatch):
    trainer._setup()
    waits = [(["rank 0"], ["rank 1"]), ([], ["rank 1"])]
    monkeypatch.setattr(ray, "wait", lambda futures, num_returns, timeout: waits.pop(0))
    checks = []

    def check():
        checks.append(1)
        if len(checks) == 2:
            raise RuntimeError("EngineDeadError")

    trainer.checkpoint_manager.replicas[0].server_handle.qerl_check_engine.remote = check
    with pytest.raises(RuntimeError, match="EngineDeadError"):
        trainer.checkpoint_manager.update_weights(1)
    assert waits == [] and trainer.events == ["sync 1"]


def test_finished_samples_are_looked_for_more_often_than_verl_does(monkeypatch):
    assert inspect.signature(ReplayBuffer).parameters["poll_interval"].default == ppo.VERL_POLL_INTERVAL
    assert "time.sleep(self.poll_interval)" in inspect.getsource(ReplayBuffer._wait_for_next_poll)

    def built(kind, prompts, buffer):
        monkeypatch.setattr(PPOTrainer, "_build_replay_buffer", lambda self: buffer)
        trainer = object.__new__(kind)
        trainer.config = OmegaConf.create(
            {"data": {"train_batch_size": prompts}, "actor_rollout_ref": {"rollout": {"n": 8}}}
        )
        assert trainer._build_replay_buffer() is buffer
        return buffer

    for kind, interval, prompts, expected in (
        (QeRLTrainerSync, 2.0, 16, 0.1),
        (QeRLTrainerColocateAsync, 2.0, 512, 0.4096),
        (QeRLTrainerSync, 2.0, 4096, 2.0),
        (QeRLTrainerColocateAsync, 0.5, 16, 0.5),  # a sampler of the user's
        (QeRLTrainerSeparateAsync, 2.0, 16, 2.0),
    ):
        buffer = built(kind, prompts, SimpleNamespace(poll_interval=interval))
        assert buffer.poll_interval == pytest.approx(expected)
    built(QeRLTrainerSync, 16, object())  # a sampler that waits in its own way


def test_our_trainers_are_verls_with_the_mixin_in_front():
    from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSync, get_trainer_cls

    for name, ours, theirs in (
        ("qerl_sync", QeRLTrainerSync, PPOTrainerSync),
        ("qerl_colocate_async", QeRLTrainerColocateAsync, PPOTrainerColocateAsync),
        ("qerl_separate_async", QeRLTrainerSeparateAsync, PPOTrainerSeparateAsync),
    ):
        mixins = AQNTrainerMixin, RunLengthMixin, RunRecordMixin, WholeCheckpointsMixin
        assert get_trainer_cls(name) is ours and ours.__mro__[1:6] == (*mixins, theirs)
        assert get_trainer_cls(ours.verl_mode) is theirs


class Engine:
    """Stands for a replica with its own engine, and records the manager's requests in the order of
    verl's sync.
    """

    def __init__(self, events):
        self.workers, self.server_handle = [], Server(events)
        for name in ("abort_all_requests", "release_kv_cache", "resume_kv_cache", "resume_generation"):
            setattr(self, name, self._named(name, events))

    @staticmethod
    def _named(name, events):
        async def call(**kwargs):
            events.append(name)

        return call


class Group:
    """Stands for actor or rollout workers of verl's sync."""

    world_size = 1

    def __init__(self, events, name):
        self.events, self.name = events, name

    def execute_checkpoint_engine(self, method, **kwargs):
        self.events.append(f"{self.name} {method[0]}")
        return [None]

    def update_weights(self, global_steps, mode=None):
        self.events.append(f"{self.name} update {global_steps}")
        return [{}]


@pytest.fixture
def standalone(monkeypatch):
    """Returns our manager in the place of verl's, with one engine, and the events around it."""
    events = []
    register_transport()
    monkeypatch.setattr(ray, "get", lambda futures: futures)
    monkeypatch.setattr(verl_checkpoint_engine, "RayWorkerGroup", lambda **kwargs: Group(events, "rollout"))
    theirs = verl_checkpoint_engine.CheckpointEngineManager(
        CheckpointEngineConfig(backend=TRANSPORT), Group(events, "actor"), [Engine(events)]
    )
    return weight_sync.StandaloneCheckpointManager(
        theirs, lambda replicas, step: events.append((len(replicas), step))
    ), events


def test_engines_of_their_own_get_the_noise_after_the_adapter_and_before_they_go_on(standalone):
    manager, events = standalone
    assert manager.update_weights(7) == {}
    assert events == [
        *("abort_all_requests", "release_kv_cache"),
        *(f"{who} {what}" for what in ("prepare", "init_process_group", "update 7") for who in ("actor", "rollout")),
        *("actor finalize", "rollout finalize", "resume_kv_cache", (1, 7), "resume_generation"),
    ]


def test_a_sync_to_engines_of_their_own_ends_when_one_has_died(standalone, monkeypatch):
    manager, events = standalone
    monkeypatch.setattr(weight_sync, "ENGINE_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(manager.actor_wg, "update_weights", lambda **kwargs: time.sleep(5))

    def died():
        raise RuntimeError("EngineDeadError")

    manager.replicas[0].server_handle.qerl_check_engine.remote = died
    with pytest.raises(RuntimeError, match="EngineDeadError"):
        manager.update_weights(1)
    assert (1, 1) not in events


def test_a_sync_to_engines_of_their_own_that_fails_says_why(standalone, monkeypatch):
    manager, events = standalone

    def fails(**kwargs):
        raise ValueError("the adapter does not fit")

    monkeypatch.setattr(manager.actor_wg, "update_weights", fails)
    with pytest.raises(ValueError, match="does not fit"):
        manager.update_weights(1)
    assert "resume_generation" not in events


@pytest.mark.parametrize(("mode", "expected"), [("ROLLOUT", ["own", "shared"]), ("TRAINER", ["own"])])
def test_a_sleeping_replica_on_the_actors_gpu_is_told_nothing(mode, expected):
    managers = {f"{name}checkpoint_manager": SimpleNamespace(replicas=[who])
                for name, who in (("standalone_", "own"), ("", "shared"))}  # fmt: skip
    trainer = SimpleNamespace(current_mode=HybridEngineMode[mode], **managers)
    assert QeRLTrainerSeparateAsync._generating(trainer) == expected


@pytest.mark.parametrize("role", [Role.Actor, Role.ActorRollout])
def test_the_separate_trainers_actor_copies_what_trains_alone(role, monkeypatch):
    trainer = QeRLTrainerSeparateAsync.__new__(QeRLTrainerSeparateAsync)
    trainer.role_worker_mapping = {role: "verl's", Role.Critic: "critic"}
    monkeypatch.setattr(PPOTrainerSeparateAsync, "_init_resource_pool_mgr", lambda self: None)
    trainer._init_resource_pool_mgr()
    made = trainer.role_worker_mapping[role].__ray_metadata__.modified_class
    assert issubclass(made, AdapterDetachWorker) and trainer.role_worker_mapping[Role.Critic] == "critic"


@pytest.mark.parametrize("hybrid", [True, False])
def test_a_line_of_verls_log_that_raises_does_not_end_a_run_without_shared_engines(hybrid):
    log = logging.getLogger(PPOTrainerSeparateAsync.__module__)
    level = log.level
    with QeRLTrainerSeparateAsync._without_the_line_that_fails(SimpleNamespace(_enable_hybrid_replicas=hybrid)):
        assert log.isEnabledFor(logging.INFO) is hybrid and log.isEnabledFor(logging.WARNING)
        if not hybrid:
            log.info("replicas", flush=True)
    assert log.level == level
    # where this fails, verl has mended the line, and what stands around it can go
    assert "flush=True" in inspect.getsource(PPOTrainerSeparateAsync._setup)
