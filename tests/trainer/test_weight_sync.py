"""Weight syncs: the noise behind them, and the watch over the engines."""

import time

import pytest
import ray
from verl.checkpoint_engine import base as verl_checkpoint_engine
from verl.workers.config import CheckpointEngineConfig

from qerl_verl.config.rules import TRANSPORT
from qerl_verl.rollout.register import register_transport
from qerl_verl.trainer import weight_sync
from tests.helpers.rollout_servers import Manager, Server


@pytest.fixture
def shared(monkeypatch):
    """Returns our manager around verl's, with two engines on the actor's GPU, and the events of the
    first."""
    events = []
    monkeypatch.setattr(ray, "get", lambda futures: futures)
    monkeypatch.setattr(ray, "wait", lambda futures, num_returns, timeout: (futures, []))
    theirs = Manager(events)
    return weight_sync.NoisyCheckpointManager(
        theirs, lambda replicas, step: events.append((len(replicas), step))
    ), events


def test_the_manager_passes_everything_else_through(shared):
    manager, _ = shared
    assert manager.backend == "naive" and len(manager.replicas) == 2


def test_a_sync_ends_with_the_noise(shared):
    manager, events = shared
    assert manager.update_weights(3) == {} and events == ["sync 3", (2, 3)]


def test_a_sync_whose_engine_has_died_ends_instead_of_waiting_for_ever(shared, monkeypatch):
    manager, events = shared
    waits = [(["rank 0"], ["rank 1"]), ([], ["rank 1"])]
    monkeypatch.setattr(ray, "wait", lambda futures, num_returns, timeout: waits.pop(0))
    checks = []

    def check():
        checks.append(1)
        if len(checks) == 2:
            raise RuntimeError("EngineDeadError")

    manager.replicas[0].server_handle.qerl_check_engine.remote = check
    with pytest.raises(RuntimeError, match="EngineDeadError"):
        manager.update_weights(1)
    assert waits == [] and events == ["sync 1"]


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
