"""Tests what is read from the files of verl's loggers, whole and damaged."""

import json
import math

import pytest
from verl.utils.logger import LocalLogger
from verl.utils.tracking import FileLogger

from qerl_verl.compare.errors import CompareError
from qerl_verl.compare.runs import SCORE, find_metrics_files, next_part, read_steps

RAY = "\x1b[36m(TaskRunnerV1 pid=7)\x1b[0m "


def line(step: int, **data: float | None) -> str:
    """Returns a line of verl's file logger; ``score`` stands for the reward's name."""
    return json.dumps({"step": step, "data": {{"score": SCORE}.get(k, k): v for k, v in data.items()}}) + "\n"


def train(*steps: int, offset: float = 0.0) -> str:
    return "".join(line(step, score=step + offset) for step in steps)


VALIDATION = line(2, **{"val-core/x/acc/mean@1": 0.5})

CASES = {
    "whole": (train(1, 2, 3), {1: 1, 2: 2, 3: 3}, []),
    "last line cut off": (train(1, 2) + line(3, score=3)[:-9], {1: 1, 2: 2}, ["the last line is cut off"]),
    "damaged line": (train(1) + '{"step": 2, "da\n' + train(3), {1: 1, 3: 3}, ["1 damaged line left out"]),
    "other lines": ("hello\n\n" + train(1) + '{"other": 1}\n[1]\n', {1: 1}, []),
    "resumed": (train(1, 2, 3, 4) + train(3, offset=0.5), {1: 1, 2: 2, 3: 3.5}, ["steps 3 to 4 were logged more"]),
    "resumed with a validation": (
        train(1, 2, 3) + VALIDATION + train(3, offset=0.5),
        {1: 1, 2: 2, 3: 3.5},
        ["steps 3 to 3 were logged more"],
    ),
    "restarted": (train(1, 2, 3) + train(1, offset=0.5), {1: 1.5}, ["steps 1 to 3 were logged more"]),
    "null": (line(1, score=None) + train(2), {1: math.nan, 2: 2}, []),
    "console": (
        f"{RAY}step:0 - val-core/x/acc/mean@1:np.float64(0.25)\n{RAY}noise\n"
        f"{RAY}step:1 - {SCORE}:np.float64(1.0) - other:2\n"
        f"Training Progress:  50%|#| 1/2 [00:01]step:2 - a:1e-05 - {SCORE}:nan - b:-inf\n"
        f"global_step:9 - {SCORE}:9\n",
        {1: 1.0, 2: math.nan},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "rewards", "said"), CASES.values(), ids=CASES.keys())
def test_the_rewards_of_a_file_and_what_is_said_about_it(tmp_path, text, rewards, said):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    steps, notes = read_steps(path)
    assert {s: v[SCORE] for s, v in steps.items() if SCORE in v} == pytest.approx(rewards, nan_ok=True)
    assert len(notes) == len(said) and all(text in note for text, note in zip(said, notes, strict=True))


def test_a_validation_of_a_resumed_run_adds_to_the_step_that_it_resumed_from(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(train(1, 2, 3) + VALIDATION + train(3))
    steps, _ = read_steps(path)
    assert steps[2] == {SCORE: 2, "val-core/x/acc/mean@1": 0.5}


def test_the_rollout_correction_of_verls_bypass_mode_has_its_usual_name(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1, score=1, **{"actor/rollout_corr/k3_kl": 0.5, "actor/entropy": 0.1}))
    assert read_steps(path)[0][1]["rollout_corr/k3_kl"] == 0.5 and "entropy" not in read_steps(path)[0][1]


def test_both_loggers_of_verl_are_read_alike(tmp_path, capsys, monkeypatch):
    data = {
        SCORE: 0.123456789,
        "actor/entropy": float("nan"),
        "timing_s/gen": 1e-7,
        "training/epoch": 3,
        "text": "x",
    }
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(path))
    logger = FileLogger("project", "experiment")
    capsys.readouterr()
    logger.log(data, step=4)
    logger.finish()
    LocalLogger().log(data, step=4)
    (tmp_path / "log").write_text(capsys.readouterr().out)
    expected = {4: {key: float(value) for key, value in data.items() if key != "text"}}
    for file in (path, tmp_path / "log"):
        found, notes = read_steps(file)
        assert found.keys() == {4} and found[4] == pytest.approx(expected[4], nan_ok=True) and not notes


def test_what_a_resumed_run_logged_before_is_read_first(tmp_path):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / "metrics.settings.json").write_text("{}")
    assert next_part(path) == tmp_path / "metrics.0.jsonl"
    (tmp_path / "metrics.0.jsonl").write_text(train(1, 2, 3))
    assert next_part(path) == tmp_path / "metrics.1.jsonl"
    for number in range(1, 11):
        (tmp_path / f"metrics.{number}.jsonl").write_text(train(3, 4, offset=number / 20))
    # the last start logged nothing
    assert find_metrics_files(tmp_path) == [tmp_path / "metrics.10.jsonl"]
    path.write_text(train(4, 5, offset=0.7))
    assert next_part(path) == tmp_path / "metrics.11.jsonl" and find_metrics_files(tmp_path) == [path]
    steps, notes = read_steps(path)
    assert {s: v[SCORE] for s, v in steps.items()} == {1: 1, 2: 2, 3: 3.5, 4: 4.7, 5: 5.7}
    assert any("read from 12 files" in note for note in notes)


@pytest.mark.parametrize("names", [("sigma_0.01", "sigma_0.02"), ("lr.1", "lr.2"), ("a", "a.05")])
def test_a_number_at_the_end_of_a_runs_name_makes_it_no_part_of_another(tmp_path, names):
    files = [tmp_path / f"{name}.jsonl" for name in names]
    for file in files:
        file.write_text(train(1, 2))
    assert find_metrics_files(tmp_path) == sorted(files)
    assert all(not read_steps(file)[1] for file in files)


FOLDERS = {
    "file": (["a.jsonl"], "a.jsonl", ["a.jsonl"]),
    "folder": (["run/m.jsonl", "run/train.log"], "run", ["run/m.jsonl"]),
    "console log alone": (["run/train.log"], "run", ["run/train.log"]),
    "log without a suffix": (["run/log"], "run", ["run/log"]),
    "several runs": (["p/a.jsonl", "p/b.jsonl"], "p", ["p/a.jsonl", "p/b.jsonl"]),
    "folder of runs": (["r/a/m.jsonl", "r/b/log.txt"], "r", ["r/a/m.jsonl", "r/b/log.txt"]),
}


@pytest.mark.parametrize(("files", "argument", "found"), FOLDERS.values(), ids=FOLDERS.keys())
def test_the_files_of_a_folder(tmp_path, files, argument, found):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"step:1 - {SCORE}:1\n" if name.endswith(("log", "txt")) else train(1))
    (tmp_path / "other.jsonl").write_text('{"question": 1}\n')
    assert find_metrics_files(tmp_path / argument) == [tmp_path / name for name in found]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file or folder"), ("", "holds no metrics of a verl run")],
)
def test_what_holds_no_metrics_is_refused(tmp_path, content, message):
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(CompareError, match=message):
        find_metrics_files(folder)
