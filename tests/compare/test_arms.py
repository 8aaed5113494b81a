"""Tests which runs the arguments name, and which of them are seeds of one arm."""

import pytest

from qerl_verl.compare.arms import group_runs, split_seed
from qerl_verl.compare.errors import CompareError

NAMES = {
    "nvfp4_s1": ("nvfp4", 1),
    "nvfp4-seed12": ("nvfp4", 12),
    "nvfp4_seed_3": ("nvfp4", 3),
    "nvfp4.seed=3": ("nvfp4", 3),
    "NVFP4_S2": ("NVFP4", 2),
    "nvfp4_aqn_s2": ("nvfp4_aqn", 2),
    "seed4": ("folder", 4),
    "s4": ("folder", 4),
    "steps": ("steps", None),
    "lr_1e-5": ("lr_1e-5", None),
    "nvfp4s1": ("nvfp4s1", None),
    "qwen2.5": ("qwen2.5", None),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_a_seed_at_the_end_of_a_name(name, expected):
    assert split_seed(name, "folder") == expected


GROUPS = {
    "by name": (
        ["a_s1", "a_s2", "b_s1"],
        ["*"],
        {"a": ["a_s1", "a_s2"], "b": ["b_s1"]},
        ["names without the seed (ARM=GLOB groups by hand): a"],
    ),
    "seeds in order": (
        ["a_s10", "a_s2"],
        ["*"],
        {"a": ["a_s2", "a_s10"]},
        ["names without the seed (ARM=GLOB groups by hand): a"],
    ),
    "by glob": (
        ["x_s1", "y_s2", "z"],
        ["one=x_*", "one=y_*", "z"],
        {"one": ["x_s1", "y_s2"], "z": ["z"]},
        [],
    ),
    "folder of runs": (
        ["r/a_s1", "r/a_s2"],
        ["r"],
        {"a": ["a_s1", "a_s2"]},
        ["names without the seed (ARM=GLOB groups by hand): a"],
    ),
    "files": (
        ["a_s1", "a_s2"],
        ["*/metrics.jsonl"],
        {"a": ["a_s1", "a_s2"]},
        ["names without the seed (ARM=GLOB groups by hand): a"],
    ),
    "arm is the folder": (
        ["a/s1", "a/s2"],
        ["a/*"],
        {"a": ["s1", "s2"]},
        ["names without the seed (ARM=GLOB groups by hand): a"],
    ),
    "same name twice": (
        ["1/a", "2/a"],
        ["*/a"],
        {"a": ["1/a", "2/a"]},
        ["names without the seed (ARM=GLOB groups by hand): a"],
    ),
    "given twice": (["a_s1", "b"], ["a_s1", "a_*", "b"], {"a": ["a_s1"], "b": ["b"]}, []),
    "path with =": (["lr=1_s1"], ["lr=1_s1"], {"lr=1": ["lr=1_s1"]}, []),
    "same seed twice": (
        ["1/a_s1", "2/a_s1"],
        ["*/a_s1"],
        {"a": ["1/a_s1", "2/a_s1"]},
        ["", "seed 1 occurs more"],
    ),
}


@pytest.mark.parametrize(("runs", "arguments", "arms", "said"), GROUPS.values(), ids=GROUPS.keys())
def test_the_arms(tmp_path, monkeypatch, make_run, runs, arguments, arms, said):
    """The shell expands ``*`` in a pattern without an arm, so its matches arrive as arguments."""
    monkeypatch.chdir(tmp_path)
    for name in runs:
        make_run(name)
    grouping = group_runs(arguments)
    assert {arm: [run.name for run in found] for arm, found in grouping.arms.items()} == arms
    assert len(grouping.notes) == len(said) and all(s in n for s, n in zip(said, grouping.notes, strict=True))


def test_several_files_in_one_folder_are_runs_by_their_names(tmp_path, make_run):
    for name in ("a_s1", "a_s2"):
        (make_run(name) / "metrics.jsonl").rename(tmp_path / f"{name}.jsonl")
    assert [run.name for run in group_runs([str(tmp_path)]).arms["a"]] == ["a_s1", "a_s2"]


def test_the_seed_comes_from_the_name_and_else_from_the_settings(make_run, tmp_path):
    make_run("a_s3", settings={"data.seed": 7})
    make_run("b", settings={"data.seed": 7})
    make_run("c", settings={"data.seed": None, "actor_rollout_ref.rollout.seed": 5})
    make_run("d")
    seeds = {run.name: run.seed for runs in group_runs([str(tmp_path)]).arms.values() for run in runs}
    assert seeds == {"a_s3": 3, "b": 7, "c": 5, "d": None}


REFUSED = {
    "no such path": (["missing"], "no file or folder matches"),
    "glob without a match": (["a=missing_*"], "a=missing_*: no file or folder matches"),
    "no pattern": (["a="], "give a file or a folder, or ARM=GLOB"),
    "no arm": (["=run"], "give a file or a folder, or ARM=GLOB"),
    "two arms": (["a=run", "b=r*"], "is in two arms, a and b"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_arguments_that_name_no_run_are_refused(tmp_path, monkeypatch, make_run, arguments, message):
    monkeypatch.chdir(tmp_path)
    make_run("run")
    with pytest.raises(CompareError) as error:
        group_runs(arguments)
    assert message in str(error.value)
