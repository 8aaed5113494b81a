"""When the trainer puts noise on and takes it off: the mixin around a trainer that goes through verl's order of hooks."""

from types import SimpleNamespace

import pytest
import ray
from omegaconf import OmegaConf

from qerl_verl.aqn.schedule import AQNSchedule
from qerl_verl.trainer.ppo import (
    AQNTrainerMixin,
    QeRLTrainerColocateAsync,
    QeRLTrainerSync,
    WholeCheckpointsMixin,
)

TOTAL = 4


class Server:
    """Stands for the Ray actor of a rollout server; writes down what reaches the engine."""

    def __init__(self, events):
        self.events = events
        self.collective_rpc = SimpleNamespace(remote=self._rpc)
        self.qerl_check_engine = SimpleNamespace(remote=lambda: events.append("alive"))
        self.clear_kv_cache = SimpleNamespace(remote=lambda: events.append("clear"))

    def _rpc(self, method, kwargs):
        assert method == "qerl_set_noise"
        self.events.append((kwargs["seed"], kwargs["step"], round(kwargs["sigma"], 6)))


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

    def update_weights(self, global_steps=None):
        return {"moved": global_steps}


class Base:
    """The order of calls of verl/trainer/ppo/v1/trainer_base.py, fit(), without the work."""

    staleness = 0

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
                self.checkpoint_manager.update_weights()  # a colocated reward model syncs in the middle of validation
                self.on_validate_end()


class Trainer(AQNTrainerMixin, Base):
    verl_mode = "sync"


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setattr(ray, "get", lambda futures: futures)
    monkeypatch.setattr(ray, "wait", lambda futures, num_returns, timeout: (futures, []))
    aqn = {"sigma_start": 0.04, "sigma_end": 0.01, "num_stages": 4, "seed": 6}
    config = {"trainer": {"v1": {"trainer_mode": "qerl_sync"}}, "qerl": {"aqn": aqn, "source_model": "somewhere"}}
    return Trainer(OmegaConf.create(config))


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


def test_metrics_tell_the_noise_that_stale_samples_were_drawn_under(trainer):
    """Samples of the step before last, begun one step earlier still: the noise of the steps 2 and 1 at step 3."""
    trainer.staleness = 1
    trainer.fit(first_step=1)
    of_samples = {s: {k.rpartition("/")[2]: round(v, 6) for k, v in m.items() if "of_samples" in k}
                  for s, m in trainer.logged.items()}  # fmt: skip
    assert of_samples[3] == {"mean": 0.02, "min": 0.0, "max": 0.04}
    assert of_samples[4] == {"mean": 0.03, "min": 0.02, "max": 0.04}
    assert round(trainer.logged[4]["qerl/aqn_sigma"], 6) == 0.01


def test_an_asynchronous_trainer_validates_when_nothing_is_being_sampled_for_training(monkeypatch):
    """Else the samples of the next step would be drawn without noise."""
    from qerl_verl.trainer import ppo

    running = {"is_prompt": True, "status": "running"}
    answers = [{"a": running, "a_0_0": {"status": "success"}}, {"a": {**running, "status": "finished"}, "b": running}]
    answers = [{"train": a} for a in answers] + [{"train": {"b": {**running, "status": "failure"}}}]
    monkeypatch.setattr(ppo.tq, "kv_list", lambda partition: answers.pop(0))
    monkeypatch.setattr(ppo.time, "sleep", lambda seconds: None)
    QeRLTrainerColocateAsync._wait_for_samples_in_flight(None)
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
    trainer.checkpoint_manager._manager.backend = "nccl"
    assert trainer.checkpoint_manager.update_weights(0) == {"moved": 0}
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


def test_our_trainers_are_verls_with_the_mixin_in_front():
    from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSync, get_trainer_cls

    for name, ours, theirs in (
        ("qerl_sync", QeRLTrainerSync, PPOTrainerSync),
        ("qerl_colocate_async", QeRLTrainerColocateAsync, PPOTrainerColocateAsync),
    ):
        assert get_trainer_cls(name) is ours and ours.__mro__[1:4] == (AQNTrainerMixin, WholeCheckpointsMixin, theirs)
        assert get_trainer_cls(ours.verl_mode) is theirs
