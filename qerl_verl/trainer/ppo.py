"""verl's built-in trainers, each with the noise schedule around its weight syncs and validations."""

from __future__ import annotations

import logging
import os

import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSync, register_trainer

from qerl_verl.aqn.schedule import AQNSchedule
from qerl_verl.config.settings import QeRLSettings

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))


class _NoisyCheckpointManager:
    """verl's CheckpointEngineManager, followed by the noise: every weight sync ends with the sigma of the step to come.

    Everything else is passed through. Standing here, and not in ``on_step_end``, the noise is in place before a trainer
    resumes generation, whichever its mode.
    """

    def __init__(self, manager, after_sync):
        self._manager = manager
        self._after_sync = after_sync

    def __getattr__(self, name):
        return getattr(self._manager, name)

    def update_weights(self, global_steps: int | None = None):
        result = self._manager.update_weights(global_steps)
        self._after_sync(global_steps)
        return result


class AQNTrainerMixin:
    """Drives the noise of the rollout engines from the trainer's clock.

    A sync at ``global_steps`` = s puts on the noise under which step s + 1 samples; so does the first sync after a
    resume at s. Validation runs on the clean policy. Metrics: ``qerl/aqn_sigma`` and ``qerl/aqn_stage`` of the step that
    was sampled.
    """

    verl_mode: str
    """The built-in mode that this trainer is; verl branches on ``trainer.v1.trainer_mode`` in many places."""

    def __init__(self, config: DictConfig):
        with open_dict(config):
            config.trainer.v1.trainer_mode = self.verl_mode
        node = OmegaConf.to_container(config.qerl, resolve=True)
        node.pop("source_model", None)
        self.qerl_settings = QeRLSettings.from_mapping(node)
        self._noise_step: int | None = None  # the step whose noise is on, None: clean
        self._sampling_step = 1
        self._validating = False
        super().__init__(config)

    def _setup(self):
        super()._setup()
        self.aqn_schedule = AQNSchedule(self.qerl_settings.aqn, self.total_training_steps)
        schedule = self.aqn_schedule
        if schedule.num_stages < self.qerl_settings.aqn.num_stages:
            logger.warning(
                "[qerl] %d training steps are fewer than qerl.aqn.num_stages=%d: one stage a step",
                self.total_training_steps,
                self.qerl_settings.aqn.num_stages,
            )
        sigmas = [schedule.sigma_of_stage(k) for k in range(schedule.num_stages)]
        print(f"[qerl] AQN sigma by stage: {', '.join(f'{s:.3g}' for s in sigmas)}", flush=True)
        self.checkpoint_manager = _NoisyCheckpointManager(self.checkpoint_manager, self._after_sync)

    def _after_sync(self, global_steps: int | None) -> None:
        if global_steps is not None:
            self._sampling_step = global_steps + 1
        if not self._validating:
            self._apply_noise()

    def _apply_noise(self) -> None:
        step = min(self._sampling_step, self.total_training_steps)
        self._push(step, self.aqn_schedule.sigma(step))

    def _push(self, step: int, sigma: float) -> None:
        """Tell every replica's engine, wait until all of them have it, and drop what was cached under other weights."""
        servers = [replica.server_handle for replica in self.checkpoint_manager.replicas]
        arguments = {"seed": self.qerl_settings.aqn.seed, "step": step, "sigma": sigma}
        ray.get([s.collective_rpc.remote("qerl_set_noise", kwargs=arguments) for s in servers])
        ray.get([s.clear_kv_cache.remote() for s in servers])

    def on_validate_begin(self):
        super().on_validate_begin()
        self._validating = True
        self._push(self._sampling_step, 0.0)

    def on_validate_end(self):
        self._validating = False
        self._apply_noise()
        super().on_validate_end()

    def step(self, metrics: dict, timing_raw: dict):
        batch = super().step(metrics, timing_raw)
        metrics["qerl/aqn_sigma"] = self.aqn_schedule.sigma(self.global_steps)
        metrics["qerl/aqn_stage"] = self.aqn_schedule.stage(self.global_steps)
        return batch


@register_trainer("qerl_sync")
class QeRLTrainerSync(AQNTrainerMixin, PPOTrainerSync):
    """verl's synchronous trainer with AQN."""

    verl_mode = "sync"


@register_trainer("qerl_colocate_async")
class QeRLTrainerColocateAsync(AQNTrainerMixin, PPOTrainerColocateAsync):
    """verl's colocated asynchronous trainer with AQN."""

    verl_mode = "colocate_async"
