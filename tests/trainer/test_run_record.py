"""Tests what a run writes beside the file of verl's file logger."""

import hashlib
import json

import pytest
from omegaconf import OmegaConf
from verl.utils.tracking import FileLogger

from qerl_verl.compare.runs import SCORE
from qerl_verl.compare.settings import read_settings
from qerl_verl.trainer.run_record import RunRecordMixin, describe_run, metrics_file


def config(folder, **trainer):
    for name in ("train", "reward"):
        (folder / name).write_text(name)
    return OmegaConf.create({
        "trainer": {"logger": ["console", "file"], "project_name": "p", "experiment_name": "e.1_s2", **trainer},
        "data": {"train_files": str(folder / "train"), "val_files": [str(folder / "train"), "hdfs://elsewhere"]},
        "reward": {"custom_reward_function": {"path": "${data.val_files[0]}", "name": "score"}},
        "actor_rollout_ref": {"model": {"path": "/cache/4bit"}, "rollout": {"n": 4}},
        "ray_kwargs": {"ray_init": {"runtime_env": {"env_vars": {"WANDB_API_KEY": "secret"}}}},
        "hub": {"hf_token": "secret"},
        "qerl": {"source_models": {"actor": "/m/base"}, "arm": "nvfp4"},
    })  # fmt: skip


@pytest.mark.parametrize(
    "environment",
    [{"VERL_FILE_LOGGER_PATH": "here.jsonl"}, {"VERL_FILE_LOGGER_ROOT": "root"}, {}],
    ids=["path", "root", "neither"],
)
def test_the_file_is_the_one_that_verl_writes(tmp_path, monkeypatch, environment):
    monkeypatch.chdir(tmp_path)
    for name in ("VERL_FILE_LOGGER_PATH", "VERL_FILE_LOGGER_ROOT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    logger = FileLogger("p", "e.1_s2")
    logger.finish()
    found = metrics_file(config(tmp_path))
    assert found.resolve() == (tmp_path / logger.filepath).resolve()
    assert metrics_file(config(tmp_path, logger=["console"])) is None
    assert metrics_file(config(tmp_path, logger="file")) == found


def test_the_record_has_the_settings_and_what_the_files_hold_but_no_credentials(tmp_path):
    found = json.loads(json.dumps(describe_run(config(tmp_path))))
    digest = hashlib.sha256(b"train").hexdigest()
    assert found["data.train_files"] == str(tmp_path / "train") and found["data.train_files.sha256"] == [digest]
    assert found["reward.custom_reward_function.path.sha256"] == [digest]
    assert found["data.val_files.sha256"] is None  # one of them is not at hand
    assert found["actor_rollout_ref.rollout.n"] == 4
    assert "secret" not in json.dumps(found)


class Trainer:
    """Does verl's part: opens the metrics file anew and logs the following steps."""

    def __init__(self, config):
        self.config, self.global_steps = config, 0
        config.trainer.derived = True  # as verl does with learning rate schedules and others

    def fit(self, agent_loop_manager):
        logger = FileLogger("p", "e")
        logger.log({SCORE: agent_loop_manager}, step=self.global_steps + 1)
        logger.finish()


class Recorded(RunRecordMixin, Trainer):
    pass


def train(config, metric, resumed_from=0):
    trainer = Recorded(config)
    trainer.global_steps = resumed_from
    trainer.fit(metric)


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    path = tmp_path / "run" / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    return path


def test_a_run_leaves_a_record_that_compare_reads(tmp_path, metrics):
    train(config(tmp_path), 0.5)
    assert sorted(p.name for p in metrics.parent.iterdir()) == [
        "metrics.jsonl",
        "metrics.settings.json",
    ]
    found = read_settings(metrics, alone=True)
    assert "trainer.derived" not in found  # so that it is the configuration that verl prints
    assert found["model"] == "/m/base" and found["data.train_files"] == [str(tmp_path / "train")]


def test_a_resumed_run_keeps_what_was_logged_before(tmp_path, metrics, capsys):
    train(config(tmp_path), 0.5)
    train(config(tmp_path), 0.6, resumed_from=7)
    train(config(tmp_path), 0.7, resumed_from=8)
    steps = {p.name: json.loads(p.read_text())["step"] for p in metrics.parent.glob("*.jsonl")}
    assert steps == {"metrics.0.jsonl": 1, "metrics.1.jsonl": 8, "metrics.jsonl": 9}
    assert f"{metrics.parent / 'metrics.1.jsonl'} from now on" in capsys.readouterr().out


def test_a_run_from_the_beginning_replaces_the_file_as_verl_does(tmp_path, metrics):
    for _ in range(2):
        train(config(tmp_path), 0.5)
    assert [p.name for p in metrics.parent.glob("*.jsonl")] == ["metrics.jsonl"]


def test_a_record_that_cannot_be_written_is_said_and_the_run_goes_on(tmp_path, metrics, capsys):
    (metrics.parent / "metrics.settings.json" / "x").mkdir(parents=True)
    train(config(tmp_path), 0.5)
    assert (
        metrics.exists() and f"the record of the run beside {metrics} could not be written" in capsys.readouterr().out
    )


def test_without_the_file_logger_nothing_is_written(tmp_path, metrics):
    metrics.parent.mkdir()
    train(config(tmp_path, logger=["console"]), 0.5)
    assert [p.name for p in metrics.parent.iterdir()] == ["metrics.jsonl"]
