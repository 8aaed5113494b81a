"""Saves of whole checkpoints, and the choice of the one to resume from."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from qerl_verl.checkpoint_errors import writing
from qerl_verl.log_lines import say
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.trainer.checkpoints import (
    PRUNED_FILE,
    check_base,
    check_policy,
    claim,
    find_damage,
    find_resumable,
    new_run,
    other_length,
    prune,
    read_record,
    read_run,
    take_folder,
    write_record,
)


class _RecordingCallback:
    """Wraps verl's checkpoint callback (verl/trainer/ppo/checkpoint_callback.py), and first writes
    the record that makes a checkpoint complete.

    verl calls it when all files of a save are written, so the user's own callback finds the record
    in the folder.
    """

    def __init__(self, callback, after_save):
        self._callback = callback
        self._after_save = after_save

    def __getattr__(self, name):
        return getattr(self._callback, name)

    def on_save(self, **kwargs):
        self._after_save(Path(kwargs["checkpoint_dir"]))
        self._callback.on_save(**kwargs)


class WholeCheckpointsMixin:
    """Resumes only from complete checkpoints, see :mod:`qerl_verl.trainer.checkpoints`."""

    def __init__(self, config: DictConfig):
        if config.trainer.get("save_freq", -1) > 0:  # before processes of the run start and models are loaded
            folder = Path(config.trainer.default_local_dir).absolute()
            with writing(str(folder), "its owner"):
                take_folder(folder, say)
        super().__init__(config)
        node = OmegaConf.to_container(config.qerl)  # what the driver has recorded there
        self._base: dict[str, str] = node.get("base_fingerprint") or {}
        self._policy: dict = node.get("policy") or {}
        self._run = new_run()
        self._saved: list[Path] = []  # by this run, in its own folder
        self.checkpoint_callback = _RecordingCallback(self.checkpoint_callback, self._after_save)

    def _load_checkpoint(self):
        """Chooses a checkpoint and lets verl load it.

        Raises:
            CheckpointError: none is complete, or the base or another setting that defines the
                policy has changed.
        """
        trainer = self.config.trainer
        if trainer.resume_mode == "auto":
            folder = find_resumable(Path(trainer.default_local_dir).absolute(), say)
        elif trainer.resume_mode == "resume_path" and isinstance(trainer.resume_from_path, str):
            folder = Path(trainer.resume_from_path).absolute()
            problem = find_damage(folder)
            if problem and (read_record(folder) or read_record(folder, PRUNED_FILE) or not folder.is_dir()):
                raise CheckpointError(f"trainer.resume_from_path={folder}: {problem}. Give another checkpoint.")
            if problem:
                say(f"{folder} is taken as it is: {problem}")
        else:
            return super()._load_checkpoint()
        if folder is None:
            with self._trainer_setting(resume_mode="disable"):
                return super()._load_checkpoint()
        check_policy(folder, self._policy)
        check_base(folder, self._base)
        steps = getattr(self, "total_training_steps", None)
        if (then := other_length(folder, steps)) and self._policy.get("qerl.aqn.enable"):
            say(f"the run that saved {folder} was to have {then} steps, this one has {steps}: the noise stages move")
        say(f"resuming from {folder}")
        self._resume_own_state(folder)
        # the same run goes on; what a path names may be another's, and has to stay
        if trainer.resume_mode == "auto":
            self._run = read_run(folder) or self._run
            self._saved = [folder]
        with self._trainer_setting(resume_mode="resume_path", resume_from_path=str(folder)):
            return super()._load_checkpoint()

    def _resume_own_state(self, folder: Path) -> None:
        """Restores QeRL's own state from the checkpoint that training resumes from, before verl
        reads it.
        """

    def _save_checkpoint(self):
        """Saves verl's checkpoint, and removes old ones when the new one is complete.

        Raises:
            CheckpointError: the disk or the quota is full, or the folder cannot be written to.
        """
        trainer = self.config.trainer
        folder = Path(trainer.default_local_dir, f"global_step_{self.global_steps}")
        only_last = trainer.get("remove_previous_ckpt_in_save", False)
        self._keep = {role: 1 if only_last else trainer.get(f"max_{role}_ckpt_to_keep") for role in ("actor", "critic")}
        kept = {f"max_{role}_ckpt_to_keep": None for role in self._keep}
        with (
            self._trainer_setting(remove_previous_ckpt_in_save=False, **kept),
            writing(str(folder), f"step {self.global_steps}"),
        ):
            claim(folder, self._run, say)
            super()._save_checkpoint()

    def _after_save(self, folder: Path) -> None:
        write_record(folder, self._base, self._policy, getattr(self, "total_training_steps", None))
        self._saved = [*(f for f in self._saved if f != folder.absolute()), folder.absolute()]
        try:
            for role, keep in self._keep.items():
                prune(self._saved, role, keep, self._run)
        except OSError as error:
            say(f"an old checkpoint could not be removed: {error}")

    @contextmanager
    def _trainer_setting(self, **values):
        """Sets values of ``trainer.*`` within the block."""
        before = {name: self.config.trainer.get(name) for name in values}
        with open_dict(self.config):
            self.config.trainer.update(values)
        try:
            yield
        finally:
            with open_dict(self.config):
                self.config.trainer.update(before)
