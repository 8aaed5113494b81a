"""verl's replay buffer for bench_grpo_step.py: bypass mode acts from a step on, within one run.

verl reads ``algorithm.rollout_correction.bypass_mode`` in each step
(verl/trainer/ppo/v1/trainer_base.py, ``_compute_old_log_prob`` and ``_compute_advantage``), so a
run can measure both modes with one start. It is verl's custom sampler
(``trainer.v1.sampler.custom_sampler``) and samples as verl's own one does.
"""

from __future__ import annotations

from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer


class BypassSteps(ReplayBuffer):
    """Sets bypass mode before each training step.

    ``trainer.v1.sampler.sampler_kwargs.bypass_from`` is the first step with it.
    """

    def sample(self, global_steps: int, partition_id: str, batch_size: int):
        """Returns verl's sample of the step, see :meth:`ReplayBuffer.sample`."""
        trainer = self.refill_fn.__self__  # verl passes the trainer's method
        bypass = global_steps >= self.sampler_kwargs.bypass_from
        trainer.config.algorithm.rollout_correction.bypass_mode = bypass
        return super().sample(global_steps=global_steps, partition_id=partition_id, batch_size=batch_size)
