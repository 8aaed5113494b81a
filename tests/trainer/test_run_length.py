"""Tests that trainer, learning rate and noise know when the epochs end a run."""

import inspect
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from verl.trainer.ppo.v1 import trainer_base
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from qerl_verl.trainer.ppo import QeRLTrainerColocateAsync, QeRLTrainerSeparateAsync, QeRLTrainerSync
from qerl_verl.trainer.run_length import RunLengthMixin


def trainer(rows, batch, epochs, wanted, updates=1):
    """Returns a trainer whose parent computes verl's ``_init_dataloader`` for ``rows`` prompts."""

    class Parent:
        def _init_dataloader(self):
            self.train_dataset = range(rows)
            self.steps_per_epoch = rows // batch
            self.total_training_steps = wanted or self.steps_per_epoch * epochs
            for optimizer in (self.config.actor_rollout_ref.actor.optim, self.config.critic.optim):
                optimizer.total_training_steps = self.total_training_steps * self.parameter_sync_step

    made = type("Trainer", (RunLengthMixin, Parent), {})()
    optimizer = {"optim": {"total_training_steps": -1}}
    made.config = OmegaConf.create(
        {
            "data": {"train_batch_size": batch, "max_prompt_length": 16},
            "trainer": {"total_epochs": epochs, "total_training_steps": wanted},
            "actor_rollout_ref": {"actor": optimizer},
            "critic": optimizer,
        }
    )
    OmegaConf.set_struct(made.config, True)
    made.parameter_sync_step = updates
    return made


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "wanted", "updates", "steps", "line"),
    [
        (32, 8, 1, 40, 1, 4, "trainer.total_training_steps=40, but the training data ends after 4 steps"),
        (39, 8, 3, 40, 4, 12, "for 40 steps set trainer.total_epochs=10"),
        (32, 8, 10, 40, 1, 40, ""),
        (32, 8, 2, None, 1, 8, ""),
        (32, 8, 20, 3, 2, 3, ""),
    ],
)
def test_the_steps_are_those_that_the_data_gives(capsys, rows, batch, epochs, wanted, updates, steps, line):
    made = trainer(rows, batch, epochs, wanted, updates)
    made._init_dataloader()
    assert made.total_training_steps == steps
    assert made.config.actor_rollout_ref.actor.optim.total_training_steps == steps * updates
    assert made.config.critic.optim.total_training_steps == steps * updates
    out = capsys.readouterr().out
    assert line in out and bool(out) is bool(line)


def test_fewer_prompts_than_a_batch_are_named_with_both_numbers():
    with pytest.raises(
        ValueError, match="data.train_batch_size=8: the training data has 7 prompts, after those longer"
    ):
        trainer(7, 8, 1, 40)._init_dataloader()


@pytest.mark.parametrize("made", [QeRLTrainerSync, QeRLTrainerColocateAsync, QeRLTrainerSeparateAsync])
def test_every_trainer_has_it(made):
    order = made.__mro__
    assert order.index(RunLengthMixin) < order.index(PPOTrainer)


@pytest.mark.parametrize(("wanted", "steps"), [(40, 4), (3, 3)])
def test_the_last_step_saves_and_validates(monkeypatch, tmp_path, wanted, steps):
    """Runs verl's own loop around a trainer whose steps do nothing: 32 prompts in batches of 8, one
    epoch.
    """
    from qerl_verl.cli.explain import compose

    done = {"steps": 0, "saved": [], "validated": []}

    class Trainer(RunLengthMixin, PPOTrainer):
        def __init__(self, config):
            self.config = config
            self.parameter_sync_step, self.global_steps = 1, 0

        def step(self, metrics, timing_raw):
            done["steps"] += 1
            return SimpleNamespace(keys=[], partition_id="train")

        def _save_checkpoint(self):
            done["saved"].append(self.global_steps)

        def _validate(self):
            done["validated"].append(self.global_steps)
            return {"score": 1.0}

        def nothing(self, *arguments, **keywords):
            pass

        on_step_end = on_sample_end = _compute_metrics = _reissue_inflight_prompts = nothing
        _start_profiling = _stop_profiling = _shutdown_dump_executor = nothing

    monkeypatch.setattr(trainer_base, "create_rl_dataset", lambda *a, **k: range(32))
    monkeypatch.setattr(trainer_base, "StatefulDataLoader", lambda **k: None)
    monkeypatch.setattr(trainer_base, "create_rl_sampler", lambda *a: None)
    monkeypatch.setattr(trainer_base.tq, "kv_clear", lambda **k: None)
    monkeypatch.chdir(tmp_path)
    settings = (
        f"trainer.total_training_steps={wanted}", "trainer.total_epochs=1", "data.train_batch_size=8", "trainer.logger=[]",
        "trainer.save_freq=100", "trainer.test_freq=100", "trainer.val_before_train=False",
    )  # fmt: skip
    made = Trainer(compose("ppo_trainer", ["+qerl=nvfp4", "actor_rollout_ref.rollout.name=vllm", *settings]))
    made.tokenizer = made.processor = None
    made.trainer_mode = "sync"
    made._init_dataloader()
    made.fit(None)
    assert done == {"steps": steps, "saved": [steps], "validated": [steps]}


def test_verl_ends_a_run_at_the_step_that_is_set_here():
    """Fails when verl itself saves and validates at the end of the epochs, or computes the number
    elsewhere.
    """
    fit, dataloader = inspect.getsource(PPOTrainer.fit), inspect.getsource(PPOTrainer._init_dataloader)
    assert "is_last_step = self.global_steps >= self.total_training_steps" in fit
    assert "current_epoch < self.config.trainer.total_epochs" in fit
    assert "self.total_training_steps = total_training_steps" in dataloader
    assert "optim_total_training_steps = total_training_steps * self.parameter_sync_step" in dataloader
