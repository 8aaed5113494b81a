"""Sets the noise of the rollout's engines by the trainer's step, around verl's weight syncs and
validations, and logs its metrics."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path

import ray
import torch
import transfer_queue as tq
from omegaconf import DictConfig

from qerl_verl.aqn.adaptive import AdaptiveSigma
from qerl_verl.aqn.divergence import measure_samples, truncation_bounds
from qerl_verl.aqn.noise import Noise, combine, describe_size
from qerl_verl.aqn.schedule import AQNSchedule
from qerl_verl.config.settings import ADAPTIVE
from qerl_verl.job import this_job
from qerl_verl.log_lines import say
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.trainer.weight_sync import NoisyCheckpointManager

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))

NOISE_FILE = "qerl_noise.json"
"""In ``global_step_N``: the noise levels that ``qerl.aqn.schedule=adaptive`` has decided."""

SAMPLE_METRICS = {
    "entropy": "qerl/sampling_entropy",
    "kl": "qerl/sampling_kl",
    "effective_sample_size": "qerl/effective_sample_size",
    "truncated": "qerl/truncated_weights",
}
"""Result of :func:`~qerl_verl.aqn.divergence.measure_samples` -> name of the metric."""


class NoiseMixin:
    """Sets the noise of the rollout engines according to the trainer's step.

    Belongs in front of :class:`~qerl_verl.trainer.resume.WholeCheckpointsMixin`, whose checkpoints
    keep an adaptive schedule's state. The settings are the job's (:mod:`qerl_verl.job`).

    A sync at ``global_steps`` = s sets the noise under which step s + 1 samples; so does the first
    sync after a resume at s. Validation runs on the clean policy. With ``qerl.aqn.enable=False``
    the engines are sent nothing. Metrics:

    - ``qerl/aqn_sigma`` and ``qerl/aqn_stage``: the schedule's values for the step
      (``adaptive`` has no stages);
    - ``qerl/aqn_sigma_effective``: the same, measured on the engines' weights, in the unit
      of ``qerl.aqn.unit``; with the suffix ``_absolute`` or ``_relative``, in that unit;
    - ``qerl/aqn_sigma_of_samples/*``: the sigma under which the samples of the step were drawn. It
      differs where an asynchronous trainer trains on samples of an earlier step;
    - ``qerl/sampling_entropy``, ``qerl/sampling_kl``, ``qerl/effective_sample_size`` and
      ``qerl/truncated_weights``: statistics of those samples, see
      :func:`qerl_verl.aqn.divergence.measure_samples`. verl's ``actor/entropy`` is the clean
      policy's.
    """

    def __init__(self, config: DictConfig):
        self.qerl_settings = this_job().settings
        self._sampling_step = 1
        # by step, the noise in effect in the engines
        self._acting: dict[int, dict[str, float]] = {}
        self._validating = False
        self._training = False
        super().__init__(config)

    def _setup(self):
        super()._setup()
        aqn, schedule = self.qerl_settings.aqn, self.aqn_schedule
        if aqn.enable and aqn.schedule == ADAPTIVE:
            say(
                f"AQN sigma: adaptive toward a divergence of {aqn.target_kl:.3g} nats a token, "
                f"from {aqn.sigma_end:.3g} to {aqn.sigma_start:.3g}"
            )
        elif aqn.enable:
            assert isinstance(schedule, AQNSchedule)
            if schedule.num_stages < aqn.num_stages:
                logger.warning(
                    "[qerl] %d training steps are fewer than qerl.aqn.num_stages=%d: one stage a step",
                    self.total_training_steps,
                    aqn.num_stages,
                )
            sigmas = [schedule.sigma_of_stage(k) for k in range(schedule.num_stages)]
            say(f"AQN sigma by stage: {', '.join(f'{s:.3g}' for s in sigmas)}")
        self.checkpoint_manager = NoisyCheckpointManager(self.checkpoint_manager, self._after_sync)

    @functools.cached_property
    def aqn_schedule(self) -> AQNSchedule | AdaptiveSigma:
        """The schedule of the noise level; first used when verl has counted the training steps."""
        aqn = self.qerl_settings.aqn
        return AdaptiveSigma(aqn) if aqn.schedule == ADAPTIVE else AQNSchedule(aqn, self.total_training_steps)

    def _resume_own_state(self, folder: Path) -> None:
        """Restores the adaptive noise level from the checkpoint.

        Raises:
            CheckpointError: its file is damaged.
        """
        super()._resume_own_state(folder)
        if not isinstance(self.aqn_schedule, AdaptiveSigma):
            return
        file = folder / NOISE_FILE
        if not file.exists():
            say(
                f"{folder} has no {NOISE_FILE}: it was not written with qerl.aqn.schedule={ADAPTIVE}, so sigma starts anew"
            )
            return
        try:
            self.aqn_schedule.load_state_dict(json.loads(file.read_text()))
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}. Restore it, or resume from another checkpoint.") from error

    def _after_save(self, folder: Path) -> None:
        if isinstance(self.aqn_schedule, AdaptiveSigma):
            (folder / NOISE_FILE).write_text(json.dumps(self.aqn_schedule.state_dict()))
        super()._after_save(folder)

    def _after_sync(self, replicas: list, global_steps: int | None) -> None:
        if global_steps is not None:
            self._sampling_step = global_steps + 1
        if not self._validating:
            self._apply_noise(replicas)

    def _apply_noise(self, replicas: list) -> None:
        step = min(self._sampling_step, self.total_training_steps)
        acting = self._push(replicas, step, self.aqn_schedule.sigma(step))
        if acting:
            found = combine(acting)
            if not self._acting:
                aqn = self.qerl_settings.aqn
                say(f"AQN on this model: {describe_size(self.aqn_schedule.bounds(), aqn.unit, found)}")
            self._acting = {s: a for s, a in self._acting.items() if s >= step - 1} | {step: found}

    def _push(self, replicas: list, step: int, sigma: float) -> list[dict[str, float]]:
        """Sends the noise to the replicas' engines, waits until all of them have applied it, and
        drops what they had cached under other weights.

        Returns:
            The noise in effect in each worker, see
            :meth:`qerl_verl.aqn.noise.NoiseInjector.measure`; empty without noise.
        """
        if not self.qerl_settings.aqn.enable:
            return []
        servers = [replica.server_handle for replica in replicas]
        arguments = asdict(Noise.of(self.qerl_settings.aqn, step, sigma))
        acting = ray.get([s.qerl_set_noise.remote(**arguments) for s in servers])
        ray.get([s.clear_kv_cache.remote() for s in servers])
        return [worker for server in acting for worker in server]

    def on_train_begin(self):
        super().on_train_begin()
        self._training = True

    def on_validate_begin(self):
        super().on_validate_begin()
        if self._training:
            self._wait_for_samples_in_flight()
        self._validating = True
        self._push(self._generating(), self._sampling_step, 0.0)

    def on_validate_end(self):
        self._validating = False
        self._apply_noise(self._generating())
        super().on_validate_end()

    def _generating(self) -> list:
        """Returns the replicas that run validation."""
        return self.checkpoint_manager.replicas

    def _wait_for_samples_in_flight(self) -> None:
        """Waits until nothing is sampled for training, since validation removes the noise for all
        sequences that the engines generate.
        """

    def step(self, metrics: dict, timing_raw: dict):
        batch = super().step(metrics, timing_raw)
        step, schedule = self.global_steps, self.aqn_schedule
        metrics["qerl/aqn_sigma"] = schedule.sigma(step)
        if isinstance(schedule, AQNSchedule):
            metrics["qerl/aqn_stage"] = schedule.stage(step)
        if acting := self._acting.get(step):
            metrics["qerl/aqn_sigma_effective"] = acting[self.qerl_settings.aqn.unit]
            metrics["qerl/aqn_sigma_effective_absolute"] = acting["absolute"]
            metrics["qerl/aqn_sigma_effective_relative"] = acting["relative"]
        sigmas = self._sigmas_of_samples(batch.tags)
        if sigmas:
            metrics["qerl/aqn_sigma_of_samples/mean"] = sum(sigmas) / len(sigmas)
            metrics["qerl/aqn_sigma_of_samples/min"] = min(sigmas)
            metrics["qerl/aqn_sigma_of_samples/max"] = max(sigmas)
        if isinstance(schedule, AdaptiveSigma):
            schedule.update(step, metrics.get("qerl/sampling_kl", math.nan), sigmas)
        return batch

    def _compute_advantage(self, batch, metrics: dict):
        metrics.update(self._measure_samples(batch))
        return super()._compute_advantage(batch, metrics=metrics)

    def _measure_samples(self, batch) -> dict[str, float]:
        """Returns metrics of the samples' log-probabilities, before verl's rejection sampling
        changes their mask. Empty if the samples have none (``rollout.calculate_log_probs``). In
        verl's bypass mode only the entropy is returned, since the clean policy's log-probabilities
        are not computed.
        """
        if not self.config.actor_rollout_ref.rollout.calculate_log_probs:
            return {}
        correction = self.config.algorithm.get("rollout_correction") or {}
        fields = ["rollout_log_probs", "response_mask"]
        if not correction.get("bypass_mode"):
            fields.append("old_log_probs")
        data = tq.kv_batch_get(
            keys=batch.keys, partition_id=batch.partition_id, select_fields=fields
        ).to_padded_tensor()
        samples = torch.tensor([not tag.get("is_padding", False) for tag in batch.tags])
        found = measure_samples(
            sampled=data["rollout_log_probs"][samples],
            clean=data["old_log_probs"][samples] if "old_log_probs" in fields else None,
            mask=data["response_mask"][samples],
            level=correction.get("rollout_is") or "token",
            bounds=truncation_bounds(correction.get("rollout_is_threshold", 2.0)),
        )
        if not correction.get("rollout_is"):
            found.pop("truncated", None)  # no weight acts, so none is truncated
        return {SAMPLE_METRICS[name]: value for name, value in found.items()}

    def _sigmas_of_samples(self, tags: list[dict]) -> list[float]:
        """Returns sigma at each sample's first and last token. The samples' versions count the
        syncs, see :meth:`_after_sync`.
        """
        versions = [
            tag[key]
            for tag in tags
            for key in ("min_global_steps", "max_global_steps")
            if not tag.get("is_padding") and tag.get(key) is not None
        ]
        return [self.aqn_schedule.sigma(min(version + 1, self.total_training_steps)) for version in versions]
