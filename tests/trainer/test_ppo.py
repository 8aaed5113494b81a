"""verl's trainers with QeRL's mixins in front."""

import inspect
import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode

from qerl_verl.config.settings import QeRLSettings
from qerl_verl.engine.detached import AdapterDetachWorker
from qerl_verl.job import Job
from qerl_verl.trainer import ppo
from qerl_verl.trainer.noise import NoiseMixin
from qerl_verl.trainer.ppo import (
    QeRLTrainerColocateAsync,
    QeRLTrainerMixin,
    QeRLTrainerSeparateAsync,
    QeRLTrainerSync,
)
from qerl_verl.trainer.resume import WholeCheckpointsMixin
from qerl_verl.trainer.run_length import RunLengthMixin
from qerl_verl.trainer.run_record import RunRecordMixin


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
        mixins = QeRLTrainerMixin, NoiseMixin, RunLengthMixin, RunRecordMixin, WholeCheckpointsMixin
        assert get_trainer_cls(name) is ours and ours.__mro__[1:7] == (*mixins, theirs)
        assert get_trainer_cls(ours.verl_mode) is theirs


def test_verl_reads_its_own_mode_and_the_settings_come_from_the_job(monkeypatch):
    class Base:
        def __init__(self, config):
            self.config, self.checkpoint_callback = config, None
            assert config.trainer.v1.trainer_mode == "colocate_async"

    class Trainer(QeRLTrainerMixin, Base):
        verl_mode = "colocate_async"

    job = Job(QeRLSettings.from_mapping({"aqn": {"seed": 3}}))
    monkeypatch.setenv(*job.environment().popitem())
    trainer = {"logger": [], "v1": {"trainer_mode": "qerl_colocate_async"}}
    made = Trainer(OmegaConf.create({"trainer": trainer, "qerl": {"aqn": {"seed": 4}}}))
    assert made.qerl_settings == job.settings and made._settings["qerl.aqn.seed"] == 4


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
    # where this fails, verl has fixed the line, and the silencing around it can go
    assert "flush=True" in inspect.getsource(PPOTrainerSeparateAsync._setup)
