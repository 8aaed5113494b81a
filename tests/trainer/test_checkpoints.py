"""Tests which checkpoint a run continues from, when the last save was cut off at any point."""

import json
import shutil
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.ownership import Owner, _start_time
from qerl_verl.trainer import checkpoints
from qerl_verl.trainer.checkpoints import (
    RECORD_FILE,
    RUN_FILE,
    check_base,
    checkpoint_step,
    find_damage,
    find_resumable,
    list_checkpoints,
    new_run,
    read_record,
    read_run,
)
from qerl_verl.trainer.resume import WholeCheckpointsMixin

TRACKER = "latest_checkpointed_iteration.txt"
ACTOR_FILES = ("model_world_size_1_rank_0.pt", "optim_world_size_1_rank_0.pt", "lora_adapter/adapter_model.safetensors")


class Base:
    """Saves and loads in the order of verl/trainer/ppo/v1/trainer_base.py.

    ``dies_before`` is the name of a file, or "callback".
    """

    def __init__(self, config):
        self.config, self.checkpoint_callback, self.dies_before = config, self, None
        self.uploaded = []

    def _file(self, path, content):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name == self.dies_before:
            path.write_bytes(b"")  # opened, not written
            raise KeyboardInterrupt
        path.write_bytes(content)

    def _save_checkpoint(self):
        trainer, root = self.config.trainer, self.root
        folder = root / f"global_step_{self.global_steps}"
        for name in ACTOR_FILES:
            self._file(folder / "actor" / name, f"{name} of {self.global_steps}".encode())
        keep = trainer.max_actor_ckpt_to_keep
        assert keep is None, "verl would remove the whole checkpoint before this one is whole"
        self._file(folder / "data.pt", b"position")
        self._file(root / TRACKER, str(self.global_steps).encode())
        if self.dies_before == "callback":
            raise KeyboardInterrupt
        self.checkpoint_callback.on_save(trainer=self, global_step=self.global_steps, checkpoint_dir=str(folder))

    def on_save(self, checkpoint_dir, **kwargs):
        self.uploaded.append((checkpoint_dir, find_damage(checkpoint_dir)))

    def _load_checkpoint(self):
        self.loaded = self.config.trainer.resume_from_path if self.config.trainer.resume_mode == "resume_path" else None


class Trainer(WholeCheckpointsMixin, Base):
    def __init__(self, root, base="b1", policy=None, steps=None, **trainer):
        settings = {"default_local_dir": str(root), "resume_mode": "auto", "resume_from_path": None}
        settings |= {"max_actor_ckpt_to_keep": None, "max_critic_ckpt_to_keep": None} | trainer
        self.root = root
        node = {"base_fingerprint": {"actor": base}, "policy": policy}
        self.total_training_steps = steps
        super().__init__(OmegaConf.create({"trainer": settings, "qerl": node}))

    def save(self, *steps):
        for self.global_steps in steps:
            self._save_checkpoint()
        return self

    def resume(self):
        self._load_checkpoint()
        return self.loaded and self.loaded.rpartition("/")[2]


def start(root, **settings):
    return Trainer(root, **settings)


def test_goes_on_from_the_last_checkpoint(tmp_path):
    start(tmp_path).save(1, 2)
    assert start(tmp_path).resume() == "global_step_2"


def test_nothing_saved_is_a_start_from_scratch(tmp_path, capsys):
    assert start(tmp_path / "absent").resume() is None
    with pytest.raises(KeyboardInterrupt):
        trainer = start(tmp_path)
        trainer.dies_before = "data.pt"
        trainer.save(1)
    assert start(tmp_path).resume() is None
    assert "global_step_1 is passed over" in capsys.readouterr().out


@pytest.mark.parametrize("keep", [None, 1, 2])
@pytest.mark.parametrize(
    "where", ["optim_world_size_1_rank_0.pt", "adapter_model.safetensors", "data.pt", TRACKER, "callback"]
)
def test_a_save_that_is_cut_off_anywhere_leaves_the_one_before(tmp_path, capsys, where, keep):
    trainer = start(tmp_path, max_actor_ckpt_to_keep=keep).save(1, 2, 3)
    trainer.dies_before = where
    with pytest.raises(KeyboardInterrupt):
        trainer.save(4)
    again = start(tmp_path, max_actor_ckpt_to_keep=keep)
    assert again.resume() == "global_step_3"
    if where in (TRACKER, "callback"):  # else verl's tracker names the third itself
        assert "is passed over" in capsys.readouterr().out
    again.save(4, 5)
    assert start(tmp_path).resume() == "global_step_5"


@pytest.mark.parametrize("file", [*(f"actor/{name}" for name in ACTOR_FILES), "data.pt", RECORD_FILE])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_file_of_the_last_checkpoint(tmp_path, capsys, file, damage):
    start(tmp_path).save(1, 2)
    path = tmp_path / "global_step_2" / file
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:3])
    assert start(tmp_path).resume() == "global_step_1"
    out = capsys.readouterr().out
    assert f"{tmp_path / 'global_step_2'} is passed over" in out and path.name in out


@pytest.mark.parametrize("content", [b"", b"\0\0", b"2x", b"7"])
def test_an_unreadable_tracker_or_one_that_names_nothing(tmp_path, capsys, content):
    start(tmp_path).save(1, 2)
    (tmp_path / TRACKER).write_bytes(content)
    assert start(tmp_path).resume() == "global_step_2"
    assert "is passed over" in capsys.readouterr().out


def test_the_tracker_can_be_set_back(tmp_path):
    start(tmp_path).save(1, 2, 3)
    (tmp_path / TRACKER).write_text("1\n")
    assert start(tmp_path).resume() == "global_step_1"


def test_a_step_that_is_saved_once_more_and_cut_off_is_not_whole_through_its_old_record(tmp_path):
    start(tmp_path).save(1, 2)
    trainer = start(tmp_path, resume_mode="resume_path", resume_from_path=str(tmp_path / "global_step_1"))
    trainer.resume()
    trainer.dies_before = "callback"  # all files have the size of before
    with pytest.raises(KeyboardInterrupt):
        trainer.save(2)
    assert start(tmp_path).resume() == "global_step_1"


def test_nothing_whole_is_an_error_that_names_every_folder_and_the_cure(tmp_path):
    start(tmp_path).save(1, 2)
    for step in (1, 2):
        (tmp_path / f"global_step_{step}" / "actor" / ACTOR_FILES[1]).unlink()
    with pytest.raises(
        CheckpointError, match=f"(?s)global_step_2: actor/{ACTOR_FILES[1]} is missing.*global_step_1.*resume_mode"
    ):
        start(tmp_path).resume()


def test_a_checkpoint_given_by_its_path(tmp_path, capsys):
    start(tmp_path).save(1, 2)
    first = tmp_path / "global_step_1"
    settings = {"resume_mode": "resume_path", "resume_from_path": str(first)}
    trainer = start(tmp_path, **settings)
    assert trainer.resume() == "global_step_1"
    assert trainer.config.trainer.resume_mode == "resume_path"
    (first / RECORD_FILE).unlink()  # of an earlier version, or put together by hand
    assert start(tmp_path, **settings).resume() == "global_step_1" and "taken as it is" in capsys.readouterr().out
    (tmp_path / "global_step_2" / "data.pt").unlink()
    with pytest.raises(CheckpointError, match="global_step_2: data.pt is missing"):
        start(tmp_path, resume_mode="resume_path", resume_from_path=str(tmp_path / "global_step_2")).resume()
    with pytest.raises(CheckpointError, match="no such folder"):
        start(tmp_path, resume_mode="resume_path", resume_from_path=str(tmp_path / "global_step_9")).resume()


def test_a_base_that_has_changed_since_is_refused(tmp_path):
    start(tmp_path, base="b1").save(1)
    with pytest.raises(CheckpointError, match="global_step_1: its actor was trained on another base.*b1 then, b2 now"):
        start(tmp_path, base="b2").resume()
    assert start(tmp_path, base="b1").resume() == "global_step_1"
    check_base(tmp_path, {"actor": "b2"})  # no record, nothing to compare


def test_a_checkpoint_moved_elsewhere_is_whole(tmp_path):
    start(tmp_path / "a").save(1)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert start(tmp_path / "b").resume() == "global_step_1"


@pytest.mark.parametrize(("keep", "left"), [(None, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_old_checkpoints_go_when_the_new_one_is_whole(tmp_path, keep, left):
    trainer = start(tmp_path, max_actor_ckpt_to_keep=keep).save(1, 2, 3, 4)
    assert [s for s in (1, 2, 3, 4) if (tmp_path / f"global_step_{s}" / "actor").exists()] == left
    assert trainer.config.trainer.max_actor_ckpt_to_keep == keep


def test_the_one_that_was_resumed_from_goes_too_and_others_stay(tmp_path):
    start(tmp_path).save(1, 2)
    trainer = start(tmp_path, remove_previous_ckpt_in_save=True)
    trainer.resume()
    trainer.save(3)
    assert [s for s in (1, 2, 3) if (tmp_path / f"global_step_{s}" / "actor").exists()] == [1, 3]


def actors(root):
    """Returns the steps whose actor exists."""
    return sorted(checkpoint_step(folder) for folder in list_checkpoints(root) if (folder / "actor").is_dir())


@pytest.mark.parametrize("where", ["another run's folder", "its own folder"])
def test_a_checkpoint_that_is_named_by_its_path_stays_so_that_the_same_command_starts_again(tmp_path, where):
    source, own = tmp_path / "other", tmp_path / ("own" if where.startswith("another") else "other")
    start(source).save(1, 2)
    named = source / "global_step_2"
    settings = {"resume_mode": "resume_path", "resume_from_path": str(named), "max_actor_ckpt_to_keep": 2}
    for _ in range(2):
        trainer = start(own, **settings)
        assert trainer.resume() == "global_step_2"
        trainer.save(3, 4, 5, 6)
        assert find_damage(named) is None and actors(source)[:2] == [1, 2]
        assert actors(own)[-2:] == [5, 6]


def test_a_checkpoint_of_another_run_in_the_same_folder_moves_aside(tmp_path, capsys):
    start(tmp_path).save(1, 2, 3)
    before = read_record(tmp_path / "global_step_2"), read_run(tmp_path / "global_step_2")
    stock = tmp_path / "global_step_4" / "actor"  # verl's, without a record
    stock.mkdir(parents=True)
    (stock / "model_world_size_1_rank_0.pt").write_text("verl's")
    start(tmp_path, resume_mode="disable", max_actor_ckpt_to_keep=1).save(2, 4, 5)
    aside = {p.name.partition(".")[0]: p for p in tmp_path.glob("*.aside-*")}
    assert sorted(aside) == ["global_step_2", "global_step_4"] and capsys.readouterr().out.count("of another run") == 2
    moved = aside["global_step_2"]
    assert find_damage(moved) is None and (read_record(moved), read_run(moved)) == before
    assert (aside["global_step_4"] / "actor" / "model_world_size_1_rank_0.pt").read_text() == "verl's"
    assert actors(tmp_path) == [1, 3, 5] and start(tmp_path).resume() == "global_step_5"


def test_a_run_overwrites_its_own_step_and_what_no_save_brought_to_its_end(tmp_path):
    trainer = start(tmp_path).save(1)
    trainer.dies_before = "data.pt"
    with pytest.raises(KeyboardInterrupt):
        trainer.save(2)
    again = start(tmp_path)
    assert again.resume() == "global_step_1"
    again.save(2, 2)
    start(tmp_path, resume_mode="disable").save(3)
    half = start(tmp_path, resume_mode="disable")
    half.dies_before = "data.pt"
    with pytest.raises(KeyboardInterrupt):
        half.save(4)
    start(tmp_path, resume_mode="disable").save(4)
    assert not list(tmp_path.glob("*.aside-*"))


def merged_model(folder):
    """Makes a model of the user's beside the files of the run."""
    (folder / "actor" / "merged").mkdir()
    (folder / "actor" / "merged" / "model.safetensors").write_text("the user's")


def another_run(folder):
    (folder / RUN_FILE).write_text(new_run())


def no_run(folder):
    """Makes checkpoints of an earlier version."""
    (folder / RUN_FILE).unlink()


@pytest.mark.parametrize(
    ("change", "stay"),
    [
        (lambda folder: None, []),
        (merged_model, ["actor/merged/model.safetensors"]),
        (another_run, [f"actor/{name}" for name in ACTOR_FILES]),
        (no_run, [f"actor/{name}" for name in ACTOR_FILES]),
    ],
)
def test_only_what_this_run_wrote_is_pruned(tmp_path, change, stay):
    trainer = start(tmp_path, max_actor_ckpt_to_keep=1).save(1)
    first = tmp_path / "global_step_1"
    change(first)
    trainer.save(2)
    left = [str(p.relative_to(first)) for p in first.rglob("*") if p.is_file() and p.parent != first]
    assert sorted(left) == sorted(stay)
    assert (find_damage(first) is None) == (change in (another_run, no_run))


def test_a_pruned_checkpoint_says_so_when_it_is_named(tmp_path):
    start(tmp_path, max_actor_ckpt_to_keep=1).save(1, 2)
    with pytest.raises(CheckpointError, match="global_step_1: files of it were removed, since trainer.max_actor"):
        start(tmp_path, resume_mode="resume_path", resume_from_path=str(tmp_path / "global_step_1")).resume()


def test_roles_are_pruned_by_settings_of_their_own(tmp_path):
    trainer = start(tmp_path, max_actor_ckpt_to_keep=1, max_critic_ckpt_to_keep=2)
    for step in (1, 2, 3):
        (tmp_path / f"global_step_{step}" / "critic").mkdir(parents=True)
        (tmp_path / f"global_step_{step}" / RUN_FILE).write_text(trainer._run)
        (tmp_path / f"global_step_{step}" / "critic" / "model.pt").write_text("critic")
        trainer.save(step)
    assert actors(tmp_path) == [3]
    assert [p.parent.name for p in sorted(tmp_path.glob("*/critic"))] == ["global_step_2", "global_step_3"]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    trainer = start(tmp_path, max_actor_ckpt_to_keep=1).save(1)

    def fails(self, target):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", fails)
    trainer.save(2)
    assert "an old checkpoint could not be removed" in capsys.readouterr().out
    assert start(tmp_path).resume() == "global_step_2"


def test_the_users_callback_finds_a_whole_checkpoint(tmp_path):
    trainer = start(tmp_path).save(1)
    assert trainer.uploaded == [(str(tmp_path / "global_step_1"), None)]
    assert read_record(tmp_path / "global_step_1")["base"] == {"actor": "b1"}


def test_a_full_disk_is_named_and_the_setting_comes_back(tmp_path):
    trainer = start(tmp_path, max_actor_ckpt_to_keep=2).save(1)

    def full(path, content):
        raise OSError(28, "No space left on device")

    trainer._file = full
    with pytest.raises(
        CheckpointError,
        match="step 2: the checkpoint could not be written to .*global_step_2 .*No space left.*start the same",
    ):
        trainer.save(2)
    assert trainer.config.trainer.max_actor_ckpt_to_keep == 2
    assert start(tmp_path).resume() == "global_step_1"


def test_verls_trainer_calls_the_callback_last(tmp_path, monkeypatch):
    """The record lists what verl wrote before it, so nothing may follow."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    class Real(WholeCheckpointsMixin, PPOTrainer):
        def __init__(self, config):
            self.config = config
            self.use_critic, self.trainer_mode, self.global_steps = False, "sync", 5
            self._base, self._policy, self._saved, self._run = {}, {}, [], new_run()
            from qerl_verl.trainer.resume import _RecordingCallback

            self.checkpoint_callback = _RecordingCallback(
                SimpleNamespace(on_save=lambda **kwargs: None), self._after_save
            )
            self.train_dataloader = SimpleNamespace(state_dict=lambda: {"position": 3})

            def save(folder, *args, max_ckpt_to_keep):
                assert max_ckpt_to_keep is None
                (tmp_path / "global_step_5" / "actor").mkdir(parents=True)
                torch.save({}, tmp_path / "global_step_5" / "actor" / "model.pt")

            self.actor_rollout_wg = SimpleNamespace(save_checkpoint=save)

        def on_step_end(self): ...

        def on_sample_end(self): ...

    trainer = {"default_local_dir": str(tmp_path), "default_hdfs_dir": None, "max_actor_ckpt_to_keep": 1}
    Real(OmegaConf.create({"trainer": trainer, "actor_rollout_ref": {"actor": {}}}))._save_checkpoint()
    assert set(read_record(tmp_path / "global_step_5")["files"]) == {"actor/model.pt", "data.pt"}
    assert find_resumable(tmp_path, print) == tmp_path / "global_step_5"


ALPHA = "actor_rollout_ref.model.lora_alpha"


OWNERS = [
    # whose file is there, whether the run saves, what is raised or said
    (None, 1, None, None),
    ("this process", 1, None, None),
    ("an ended one", 1, None, None),
    ("another one", 1, r"trainer.default_local_dir=.*: process \d+ on .* saves its checkpoints there now. Give", "waiting up to"),
    ("another one", -1, None, None),
    ("one that ends", 1, None, "waiting up to"),
    ("another host's", 1, None, "process 1 on elsewhere was the last that saved in"),
    ("a damaged file", 1, None, None),
]  # fmt: skip


@pytest.mark.parametrize(("whose", "save_freq", "refused", "said"), OWNERS)
def test_one_run_at_a_time_saves_in_a_folder(tmp_path, monkeypatch, capsys, whose, save_freq, refused, said):
    monkeypatch.setattr(checkpoints, "OWNER_SECONDS", 0.5 if refused else 30.0)
    file, sleeping = tmp_path / "new" / checkpoints.OWNER_FILE, subprocess.Popen(["sleep", "600"])
    here, other = Owner.current(), replace(Owner.current(), process=sleeping.pid, start=_start_time(sleeping.pid))
    try:
        if whose:
            file.parent.mkdir()
        if whose == "a damaged file":
            file.write_text("{")
        elif whose:
            elsewhere = replace(here, host="elsewhere", process=1)
            {"this process": here, "another host's": elsewhere}.get(whose, other).write(file)
        if whose == "an ended one":
            sleeping.kill()
        elif whose == "one that ends":
            threading.Timer(0.5, sleeping.kill).start()
        if refused:
            with pytest.raises(CheckpointError, match=refused):
                start(file.parent, save_freq=save_freq)
        else:
            start(file.parent, save_freq=save_freq)
        assert (Owner.read(file) == here) is (save_freq > 0 and not refused)
    finally:
        sleeping.kill()
        sleeping.wait()
    assert (said or "") in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_another_policy_is_refused_and_the_checkpoint_stays(tmp_path, mode):
    start(tmp_path, policy={ALPHA: 32, "qerl.aqn.seed": 42}).save(1)
    settings = {"resume_mode": mode, "resume_from_path": str(tmp_path / "global_step_1")}
    with pytest.raises(CheckpointError, match=rf"{ALPHA} was 32 and is 16; set {ALPHA}=32\. To begin a new run"):
        start(tmp_path, policy={ALPHA: 16, "qerl.aqn.seed": 42}, **settings).resume()
    assert find_damage(tmp_path / "global_step_1") is None
    assert start(tmp_path, policy={ALPHA: 32, "something.new": 1}, **settings).resume() == "global_step_1"


def test_a_record_without_a_policy_is_let_through(tmp_path):
    start(tmp_path).save(1)
    file = tmp_path / "global_step_1" / RECORD_FILE
    record = json.loads(file.read_text())
    del record["policy"], record["total_training_steps"]
    file.write_text(json.dumps(record))
    assert start(tmp_path, policy={ALPHA: 16}, steps=9).resume() == "global_step_1"


@pytest.mark.parametrize(("then", "now", "noise", "said"), [(40, 80, True, 1), (40, 40, True, 0), (40, 80, False, 0)])
def test_another_number_of_steps_moves_the_stages_and_is_said(tmp_path, capsys, then, now, noise, said):
    policy = {"qerl.aqn.enable": noise}
    start(tmp_path, policy=policy, steps=then).save(1)
    start(tmp_path, policy=policy, steps=now).resume()
    assert capsys.readouterr().out.count(f"was to have {then} steps, this one has {now}: the noise stages move") == said
