"""verl's built-in trainers with QeRL's mixins, registered with verl."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager

import ray
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from verl.trainer.ppo.utils import Role
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSeparateAsync, PPOTrainerSync, register_trainer
from verl.trainer.ppo.v1 import trainer_separate_async as verl_separate_async

from qerl_verl.engine.detached import AdapterDetachWorker
from qerl_verl.rollout.ahead import AHEAD
from qerl_verl.trainer.noise import NoiseMixin
from qerl_verl.trainer.resume import WholeCheckpointsMixin
from qerl_verl.trainer.run_length import RunLengthMixin
from qerl_verl.trainer.run_record import RunRecordMixin
from qerl_verl.trainer.weight_sync import StandaloneCheckpointManager

VERL_POLL_INTERVAL = 2.0
"""Seconds between two polls for finished samples, for which verl has no setting."""


def poll_interval(samples: int) -> float:
    """Returns the seconds between two polls for ``samples`` samples: 0.1, and more above a thousand
    samples, since each poll lists all of them.
    """
    return min(VERL_POLL_INTERVAL, max(0.1, 1e-4 * samples))


class QeRLTrainerMixin(NoiseMixin, RunLengthMixin, RunRecordMixin, WholeCheckpointsMixin):
    """What QeRL adds to each of verl's trainers: the mixins above, a shorter polling interval, and
    rollout servers that start ahead of time.
    """

    verl_mode: str
    """The built-in mode that this trainer extends; verl branches on ``trainer.v1.trainer_mode`` in
    many places.
    """

    def __init__(self, config: DictConfig):
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.verl_mode
        super().__init__(config)

    def _build_replay_buffer(self):
        """Builds verl's replay buffer, or the user's own sampler, and shortens its polling interval
        of two seconds.

        A step waits until the next poll (verl/trainer/ppo/v1/replay_buffer.py,
        _wait_for_next_poll): a second on average, where a rollout takes a few. ``separate_async``
        also uses the interval to measure whether samples are scarce, so there it is unchanged.
        """
        buffer = super()._build_replay_buffer()
        if self.verl_mode != "separate_async" and getattr(buffer, "poll_interval", None) == VERL_POLL_INTERVAL:
            buffer.poll_interval = poll_interval(
                self.config.data.train_batch_size * self.config.actor_rollout_ref.rollout.n
            )
        return buffer

    def _init_resource_pool_mgr(self):
        """Initializes verl's resource pools, the last step before the workers, and starts the
        rollout's servers ahead of time: from here on this process waits for others.
        ``separate_async`` has two kinds of servers, which verl starts.
        """
        super()._init_resource_pool_mgr()
        if self.verl_mode != "separate_async":
            AHEAD.start(self.config)


@register_trainer("qerl_sync")
class QeRLTrainerSync(QeRLTrainerMixin, PPOTrainerSync):
    """verl's synchronous trainer with AQN."""

    verl_mode = "sync"


def _wait_for_samples_in_flight() -> None:
    """Waits for unfinished prompts, which verl leaves running beside the validation."""
    while True:
        tags = (tq.kv_list("train") or {}).get("train", {}).values()
        if not any(tag.get("is_prompt") and tag.get("status") in ("pending", "running") for tag in tags):
            return
        time.sleep(0.1)


@register_trainer("qerl_colocate_async")
class QeRLTrainerColocateAsync(QeRLTrainerMixin, PPOTrainerColocateAsync):
    """verl's colocated asynchronous trainer with AQN."""

    verl_mode = "colocate_async"

    def _wait_for_samples_in_flight(self) -> None:
        _wait_for_samples_in_flight()


@register_trainer("qerl_separate_async")
class QeRLTrainerSeparateAsync(QeRLTrainerMixin, PPOTrainerSeparateAsync):
    """verl's asynchronous trainer whose engines have GPUs of their own, with AQN.

    Replicas on the actor's GPUs also generate while the actor does not train
    (``actor_rollout_ref.hybrid_engine``). They sleep otherwise, and a sleeping engine is sent
    nothing.
    """

    verl_mode = "separate_async"

    def _init_resource_pool_mgr(self):
        super()._init_resource_pool_mgr()
        for role in (Role.Actor, Role.ActorRollout):
            if role in self.role_worker_mapping:
                self.role_worker_mapping[role] = ray.remote(AdapterDetachWorker)

    def _setup(self):
        with self._without_the_line_that_fails():
            super()._setup()
        self.standalone_checkpoint_manager = StandaloneCheckpointManager(
            self.standalone_checkpoint_manager, self._after_sync
        )

    @contextmanager
    def _without_the_line_that_fails(self):
        """Silences a failing log call of verl's.

        verl's _setup ends with a log call for which ``logging`` raises a TypeError
        (trainer_separate_async.py, ``flush=True``), with ``hybrid_engine=False`` only. Within the
        block its logger prints nothing below WARNING.
        """
        log = verl_separate_async.logger
        level = log.level
        if not self._enable_hybrid_replicas:
            log.setLevel(max(level, logging.WARNING))
        try:
            yield
        finally:
            log.setLevel(level)

    def _generating(self) -> list:
        awake = self.current_mode == verl_separate_async.HybridEngineMode.ROLLOUT
        return [*self.standalone_checkpoint_manager.replicas, *(self.checkpoint_manager.replicas if awake else ())]

    def _wait_for_samples_in_flight(self) -> None:
        _wait_for_samples_in_flight()
