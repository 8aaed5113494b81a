"""Tests the study: its arms differ only in what they compare, its data, and runs side by side."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import qerl_verl.plugin  # noqa: F401  (makes Hydra find the group, as `import verl` does)
from qerl_verl.recipes.study import prepare, runs
from qerl_verl.recipes.study.__main__ import main
from qerl_verl.recipes.study.runs import ARMS, SCALES, Run, is_finished, metrics_file, parse_arm, run_all

RECIPES = Path(__file__).parents[2] / "recipes"


def flat(arm, *overrides):
    with initialize_config_dir(str(RECIPES), version_base=None):
        config = OmegaConf.to_container(
            compose(f"study/{arm}", overrides=["study.out=/study", *overrides]), resolve=True
        )

    def leaves(node, prefix):
        if isinstance(node, dict) and node:
            for key, value in node.items():
                yield from leaves(value, f"{prefix}.{key}")
        else:
            yield prefix[1:], node

    return dict(leaves(config, ""))


NAMED_AFTER_THE_ARM = {
    "study.arm",
    "trainer.experiment_name",
    "trainer.default_local_dir",
    "actor_rollout_ref.rollout.trace.experiment_name",
}
OF_THE_ARM = {
    "bf16_aqn": {"qerl.aqn.enable"},
    "nvfp4": {"qerl.arm", "qerl.quantization.method"},
    "nvfp4_aqn": {"qerl.arm", "qerl.quantization.method", "qerl.aqn.enable"},
    "nvfp4_gptq": {"qerl.arm", "qerl.quantization.method", "qerl.quantization.calibration"},
    "mxfp4": {"qerl.arm"},
    "nf4": {"qerl.arm"},
}
OF_THE_NOISE = {
    "nvfp4_aqn_rounded": {"qerl.aqn.rounding"},
    "nvfp4_aqn_relative": {"qerl.aqn.unit"},
    "nvfp4_aqn_adaptive": {"qerl.aqn.schedule", "qerl.aqn.target_kl"},
    # it writes verl's default, by which the switch leaves the correction off
    "nvfp4_aqn_no_is": set(),
    "nvfp4_gptq_aqn": {"qerl.quantization.method", "qerl.quantization.calibration"},
}


@pytest.mark.parametrize(
    ("arm", "base", "differs"),
    [(arm, "bf16", keys) for arm, keys in OF_THE_ARM.items()] + [(a, "nvfp4_aqn", k) for a, k in OF_THE_NOISE.items()],
)
def test_an_arm_differs_from_its_base_in_what_it_compares(arm, base, differs):
    first, second = flat(base), flat(arm)
    assert {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)} == (
        NAMED_AFTER_THE_ARM | differs
    )


def test_every_arm_is_in_the_tables():
    assert {"bf16", *OF_THE_ARM, *OF_THE_NOISE} == set(ARMS)


@pytest.mark.parametrize("scale", SCALES)
def test_a_seed_is_the_seed_of_everything(scale):
    changed = {key for key, value in flat("nvfp4_aqn", f"study/scale={scale}", "study.seed=7").items() if value == 7}
    assert changed >= {
        "data.seed",
        "actor_rollout_ref.actor.fsdp_config.seed",
        "actor_rollout_ref.actor.data_loader_seed",
        "actor_rollout_ref.rollout.seed",
        "qerl.aqn.seed",
    }


SOLUTION = "a 1+1=<<1+1=2>>2\nb 2+1=<<2+1=3>>3\nc 3+1=<<3+1=4>>4\n#### 4"


def row(solution=SOLUTION):
    return {"prompt": [{"role": "user", "content": "Q"}], "extra_info": {"solution": solution}}


def test_the_beginning_of_a_solution_is_given():
    short = prepare.give_beginning(row(), remaining=2)
    assert short["prompt"][0]["content"].endswith("go on from there:\na 1+1=<<1+1=2>>2")
    assert short["extra_info"]["solution"] == "b 2+1=<<2+1=3>>3\nc 3+1=<<3+1=4>>4\n#### 4"
    assert row()["prompt"][0]["content"] == "Q"
    assert prepare.give_beginning(row(), remaining=3) == row()


def test_data_of_start_and_rl_are_of_different_problems(tmp_path):
    import pandas

    for split, count in (("train", 6), ("test", 3)):
        lines = [json.dumps({"question": f"{split} {i}?", "answer": SOLUTION}) for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    counts = prepare.write_data(tmp_path, tmp_path / "data", remaining=2)
    assert counts == {"start": 6, "train": 3, "validation": 3, "test": 3}
    first = {p[0]["content"].split("?")[0] for p in pandas.read_parquet(tmp_path / "data" / "start.parquet")["prompt"]}
    second = {p[0]["content"].split("?")[0] for p in pandas.read_parquet(tmp_path / "data" / "train.parquet")["prompt"]}
    assert first == {"train 0", "train 2", "train 4"} and second == {"train 1", "train 3", "train 5"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16", [1]),
        ("bf16:3", [3]),
        ("bf16:1-3,7", [1, 2, 3, 7]),
        ("fp8:1", "fp8: no arm of the study; there are bf16"),
        ("common:1", "common: no arm"),
        ("bf16:x", "seeds are numbers and ranges, e.g. bf16:1-3,7"),
        ("bf16:1-", None),
    ],
)
def test_arms_and_seeds(text, expected):
    if isinstance(expected, list):
        assert parse_arm(text) == [Run("bf16", seed) for seed in expected]
    elif expected is None:
        assert parse_arm(text) == [Run("bf16", 1)]
    else:
        with pytest.raises(SystemExit, match=expected):
            parse_arm(text)


def test_runs_side_by_side_and_taken_up_again(tmp_path, monkeypatch, capsys):
    script = "import os, sys; f = os.environ['VERL_FILE_LOGGER_PATH']; open(f, 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    fails = {"nf4_s1"}

    def command(run, out, scale, overrides):
        return [sys.executable, "-c", f"{script}; sys.exit({int(run.name in fails)})"]

    monkeypatch.setattr(runs, "command", command)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.05)
    wanted = [Run("bf16", 1), Run("nf4", 1), Run("nvfp4", 2)]
    assert run_all(wanted, tmp_path, "qwen3b", ["0", "1"], 1, 0.0) == 1
    assert [is_finished(tmp_path, run) for run in wanted] == [True, False, True]
    assert metrics_file(tmp_path, wanted[0]).read_text() == "0" and metrics_file(tmp_path, wanted[1]).read_text() == "1"
    assert "not finished: nf4_s1" in capsys.readouterr().out
    fails.clear()
    assert run_all(wanted, tmp_path, "qwen3b", ["0"], 2, 0.0) == 0
    assert "3 runs, 2 of them finished already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scale", "overrides", "message"),
    [
        ("qwen3b", ["trainer.total_training_steps=5"], None),
        ("qwen7b", ["trainer.total_training_steps=5"], "bf16_s1 has finished with study/scale=qwen3b, not with study/scale=qwen7b"),
        ("qwen3b", [], "with trainer.total_training_steps=5, not with fewer settings"),
        ("qwen3b", ["trainer.total_training_steps=5", "a=1"], "with fewer settings, not with a=1"),
    ],
)  # fmt: skip
def test_a_finished_run_with_other_settings_is_not_taken_for_the_wanted_one(tmp_path, scale, overrides, message):
    run, before = Run("bf16", 1), tmp_path / "before"
    words = runs.command(run, before, "qwen3b", ["trainer.total_training_steps=5"])
    file = runs.finished_file(tmp_path / "moved", run)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"command": ["/another/python", *words[1:]], "seconds": 1.0}))
    if message is None:
        assert run_all([run], tmp_path / "moved", scale, [], 1, 0.0, overrides) == 0
    else:
        with pytest.raises(SystemExit, match=message):
            run_all([run], tmp_path / "moved", scale, [], 1, 0.0, overrides)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], None),
        # to prepare once more
        (["data/train.parquet", "model/config.json", "model/start.json"], None),
        (["model/config.json"], "model holds a model that this command did not make"),
        (
            ["model/config.json", "model/start.json", "runs/bf16_s1/log.txt"],
            "runs has runs with the data and the model",
        ),
    ],
)
def test_what_runs_have_used_is_not_prepared_again(tmp_path, monkeypatch, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(prepare, "write_data", lambda *_: {"train": 1})
    command = ["prepare", "--data-only", "--out", str(tmp_path)]
    if message is None:
        assert main(command) == 0
    else:
        with pytest.raises(SystemExit, match=message):
            main(command)


def test_an_interruption_ends_the_runs_with_it(tmp_path, monkeypatch):
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = []

    def start(*arguments):
        if started:
            raise KeyboardInterrupt
        started.append(subprocess.Popen(sleeping, start_new_session=True))
        return started[-1]

    monkeypatch.setattr(runs, "_start", start)
    with pytest.raises(KeyboardInterrupt):
        run_all([Run("bf16", 1), Run("bf16", 2)], tmp_path, "qwen3b", ["0"], 2, 0.0)
    assert [process.returncode for process in started] == [-signal.SIGTERM]


@pytest.mark.parametrize(
    ("gib", "scale", "most"),
    [(119.0, "smollm2", 11), (22.0, "smollm2", 2), (1.0, "smollm2", 1), (22.0, "qwen7b", None)],
)
def test_as_many_runs_side_by_side_as_the_hosts_memory_takes(gib, scale, most):
    assert runs.most_side_by_side(gib, scale) == most


def test_more_runs_than_the_hosts_memory_takes_are_refused_before_one_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "HOST_GIB_PER_RUN", 1e6)
    monkeypatch.setattr(runs, "_start", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(SystemExit, match="choose --per-gpu and --gpus for at most 1 runs side by side"):
        run_all([Run("bf16", 1), Run("bf16", 2)], tmp_path, "smollm2", ["0"], 2, 0.0)
