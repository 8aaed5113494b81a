"""Tests where a run's settings come from, and which differences keep runs from being compared."""

import pprint

import pytest
import yaml
from omegaconf import OmegaConf

from qerl_verl.cli.explain import compose
from qerl_verl.compare.arms import group_runs
from qerl_verl.compare.runs import SCORE
from qerl_verl.compare.settings import compare_settings, read_settings
from qerl_verl.config.keys import flatten

CONFIG = {
    "data": {
        "train_files": "/d/train.parquet",
        "train_batch_size": 8,
        "val_files": ["${data.folder}/validation.parquet"],
        "folder": "/d",
    },
    "actor_rollout_ref": {
        "model": {
            "path": "/cache/4bit",
            "text": "a {brace} and 'a quote' " + "that is long enough to be wrapped " * 5,
        },
        "rollout": {"n": 4, "prompt_length": "${data.train_batch_size}"},
    },
    "qerl": {"arm": "nvfp4", "source_models": {"actor": "/m/base"}},
}
EXPECTED = {
    "data.train_files": ["/d/train.parquet"],
    "data.train_batch_size": 8,
    "model": "/m/base",
    "qerl.arm": "nvfp4",
}
RAY = "\x1b[36m(TaskRunnerV1 pid=7)\x1b[0m "


def write_hydra(folder):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(CONFIG))


def test_the_settings_from_hydras_folder_have_their_references_resolved(make_run):
    folder = make_run("run")
    write_hydra(folder / "outputs" / "2026-11-26" / "20-34-11")
    found = read_settings(folder / "metrics.jsonl", alone=True)
    assert EXPECTED.items() <= found.items()
    assert (
        found["data.val_files"] == ["/d/validation.parquet"] and found["actor_rollout_ref.rollout.prompt_length"] == 8
    )


def test_hydras_folder_is_nobodys_where_several_runs_share_it(make_run):
    folder = make_run("run")
    write_hydra(folder)
    assert read_settings(folder / "metrics.jsonl", alone=False) is None


@pytest.mark.parametrize("prefix", [RAY, "(TaskRunner pid=7) ", ""], ids=["colours", "plain", "without Ray"])
def test_the_settings_from_what_verl_prints_among_other_lines(tmp_path, prefix):
    printed = pprint.pformat(CONFIG).splitlines()
    other = "\x1b[36m(WorkerDict pid=9)\x1b[0m {'a': 1}\n" if prefix else ""
    text = "hello\n" + other.join(f"{prefix}{line}\n" for line in printed) + f"{prefix}step:1 - {SCORE}:1\n"
    (tmp_path / "log").write_text(text)
    assert EXPECTED.items() <= read_settings(tmp_path / "log", alone=True).items()


def test_a_console_log_beside_the_metrics_of_one_run_tells_its_settings(make_run):
    folder = make_run("run")
    (folder / "log.txt").write_text(pprint.pformat(CONFIG) + "\n")
    assert EXPECTED.items() <= read_settings(folder / "metrics.jsonl", alone=True).items()
    assert read_settings(folder / "metrics.jsonl", alone=False) is None


def test_the_record_comes_before_hydras_folder(make_run):
    folder = make_run("run", settings={"qerl.arm": "bf16"})
    write_hydra(folder)
    assert read_settings(folder / "metrics.jsonl", alone=True)["qerl.arm"] == "bf16"


UNKNOWN = {
    "nothing": None,
    "no JSON": "{",
    "another file": "[1]",
    "another record": '{"settings": 3}',
}


@pytest.mark.parametrize("record", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_settings_that_cannot_be_read_are_not_known(make_run, record):
    folder = make_run("run")
    if record is not None:
        (folder / "metrics.settings.json").write_text(record)
    assert read_settings(folder / "metrics.jsonl", alone=True) is None


BASE = {
    "data.train_files": ["/d/train.parquet"],
    "data.train_batch_size": 8,
    "data.seed": 1,
    "actor_rollout_ref.rollout.n": 4,
    "actor_rollout_ref.model.path": "/m/base",
    "actor_rollout_ref.actor.data_loader_seed": 1,
    "study.seed": 1,
    "study.out": "out",
    "trainer.experiment_name": "one",
    "qerl.arm": "nvfp4",
    "reward.custom_reward_function.path": None,
}
HASH = "data.train_files.sha256"
DIFFERENCES = {
    "seed, name": (
        {
            "data.seed": 2,
            "trainer.experiment_name": "two",
            "actor_rollout_ref.actor.data_loader_seed": 2,
        },
        [],
        [],
    ),
    "a recipe's own": ({"study.seed": 2, "study.out": "/o"}, [], []),
    "arm": ({"qerl.arm": "bf16"}, [], ["qerl.arm"]),
    "model": ({"actor_rollout_ref.model.path": "/m/other"}, [], ["model"]),
    "data": (
        {"data.train_files": ["/d/other.parquet"]},
        ["data.train_files is /d/train.parquet (a) and /d/other"],
        [],
    ),
    "one data file as text": ({"data.train_files": "/d/train.parquet"}, [], []),
    "batch": ({"data.train_batch_size": 16}, ["data.train_batch_size is 8 (a) and 16 (b)"], []),
    "rollout n": (
        {"actor_rollout_ref.rollout.n": 8},
        ["actor_rollout_ref.rollout.n is 4 (a) and 8 (b)"],
        [],
    ),
    "reward": (
        {"reward.custom_reward_function.path": "/r.py"},
        ["reward.custom_reward_function.path is null (a) and /r.py (b)"],
        [],
    ),
    "a key that one lacks": ({"actor_rollout_ref.rollout.n": ...}, [], []),
}


@pytest.mark.parametrize(("change", "conflicts", "differing"), DIFFERENCES.values(), ids=DIFFERENCES.keys())
def test_what_two_arms_do_not_share(tmp_path, make_run, change, conflicts, differing):
    make_run("a", settings=BASE)
    make_run("b", settings={k: v for k, v in (BASE | change).items() if v is not ...})
    found = compare_settings(group_runs([str(tmp_path)]).arms)
    assert len(found.conflicts) == len(conflicts)
    assert all(said in conflict for said, conflict in zip(conflicts, found.conflicts, strict=True))
    assert list(found.differing) == differing and not found.unknown


CONTENTS = {
    "same content, another path": (["x"], ["x"], "/e/train.parquet", 0),
    "other content, same path": (["x"], ["y"], "/d/train.parquet", 1),
    "not known of one": (["x"], None, "/d/train.parquet", 0),
    "not known of one, another path": (["x"], None, "/e/train.parquet", 1),
}


@pytest.mark.parametrize(("one", "other", "path", "conflicts"), CONTENTS.values(), ids=CONTENTS.keys())
def test_data_are_the_same_when_their_content_is(tmp_path, make_run, one, other, path, conflicts):
    make_run("a", settings=BASE | {HASH: one})
    make_run("b", settings=BASE | {HASH: other, "data.train_files": [path]})
    assert len(compare_settings(group_runs([str(tmp_path)]).arms).conflicts) == conflicts


MODELS = {
    "same bytes, another path": ("/m/base", "/n/base", "1", "1", False),
    "other bytes, another path": ("/m/base", "/n/base", "1", "2", True),
    "quantized differently": ("/m/base", "/m/base", "1", "2", False),
}


@pytest.mark.parametrize(("one", "other", "first", "second", "differing"), MODELS.values(), ids=MODELS.keys())
def test_a_model_is_the_same_under_another_path(tmp_path, make_run, one, other, first, second, differing):
    for name, path, fingerprint in (("a", one, first), ("b", other, second)):
        change = {"qerl.source_models.actor": path, "qerl.base_fingerprint.actor": fingerprint}
        make_run(name, settings=BASE | change)
    found = compare_settings(group_runs([str(tmp_path)]).arms)
    assert (list(found.differing), found.conflicts) == (["model"] if differing else [], [])


@pytest.mark.parametrize("arm", ["nvfp4_aqn", "bf16"])
def test_two_seeds_of_the_studys_recipe_are_seeds_of_one_arm(tmp_path, make_run, arm):
    for seed in (1, 2):
        config = compose(f"study/{arm}", [f"study.seed={seed}", f"study.out={tmp_path}"])
        make_run(f"{arm}_s{seed}", settings=flatten(OmegaConf.to_container(config, resolve=True)))
    found = compare_settings(group_runs([str(tmp_path)]).arms)
    assert not found.conflicts and not found.differing


def test_runs_of_one_arm_that_differ_in_more_than_the_seed_are_no_seeds_of_it(tmp_path, make_run):
    make_run("a_s1", settings=BASE | {"qerl.aqn.sigma_start": 0.01})
    make_run("a_s2", settings=BASE | {"qerl.aqn.sigma_start": 0.02, "data.seed": 2})
    (conflict,) = compare_settings(group_runs([str(tmp_path)]).arms).conflicts
    assert "runs of arm a are not seeds of one arm" in conflict and "sigma_start is 0.01 (a_s1) and 0.02" in conflict


def test_runs_without_settings_are_named(tmp_path, make_run):
    make_run("a", settings=BASE)
    make_run("b")
    assert compare_settings(group_runs([str(tmp_path)]).arms).unknown == ["b"]
