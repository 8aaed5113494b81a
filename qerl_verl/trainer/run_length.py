"""Ends a run whose epochs are over before ``trainer.total_training_steps`` like every other run.

verl leaves its loop when the epochs are over (verl/trainer/ppo/v1/trainer_base.py, fit). It saves
and validates for the last time only at the step ``total_training_steps``, and it schedules its
learning rate, as QeRL its noise, over that number. So the number of steps that the data gives
replaces it.
"""

from __future__ import annotations

from omegaconf import OmegaConf, open_dict

from qerl_verl.data.steps import ends_early, epochs_for, reachable_steps
from qerl_verl.log_lines import say


class RunLengthMixin:
    """Sets ``total_training_steps`` of one of verl's V1 trainers to the number of steps that the
    data and ``trainer.total_epochs`` give.
    """

    def _init_dataloader(self):
        """Builds verl's data loader, then sets the true number of steps, for the trainer and the
        schedulers of the learning rates.

        Raises:
            ValueError: the data has fewer prompts than a batch, after overlong ones were dropped.
        """
        super()._init_dataloader()
        rows, batch = len(self.train_dataset), self.config.data.train_batch_size
        epochs, wanted = self.config.trainer.total_epochs, self.total_training_steps
        if rows < batch:
            raise ValueError(
                f"data.train_batch_size={batch}: the training data has {rows} prompts, after those "
                f"longer than data.max_prompt_length={self.config.data.max_prompt_length} were "
                "dropped; lower the one or raise the other"
            )
        reachable = reachable_steps(rows, batch, epochs)
        if reachable >= wanted:
            return
        say(ends_early(wanted, reachable, epochs, epochs_for(wanted, rows, batch)))
        self.total_training_steps = reachable
        with open_dict(self.config):
            for optimizer in ("actor_rollout_ref.actor.optim", "critic.optim"):
                if OmegaConf.select(self.config, optimizer):
                    updates = reachable * self.parameter_sync_step
                    OmegaConf.update(self.config, f"{optimizer}.total_training_steps", updates)
