"""Tests that the recipes' reward scores every row of BigMath and of the benchmarks."""

import json
from pathlib import Path

import pandas
import pytest
from omegaconf import OmegaConf

from qerl_verl.data import bigmath, math_benchmarks
from qerl_verl.data.math_score import INSTRUCTION, can_be_boxed, compute_score

EASY = [{"prompt": "What is $1 + 1$? ", "solution": "2"}, {"problem": "Halve $x$.", "answer": "\\frac{x}{2}"}]


def write(folder: Path, **files) -> Path:
    for name, examples in files.items():
        text = "\n".join(e if isinstance(e, str) else json.dumps(e) for e in examples)
        (folder / f"{name}.jsonl").write_text(text + "\n")
    return folder


def read(file: Path) -> list[dict]:
    return pandas.read_parquet(file).to_dict("records")


def test_bigmath_becomes_prompts_that_the_reward_scores(tmp_path, capsys):
    source = write(tmp_path, level_3_4_5=[*EASY, {"prompt": "?", "solution": "\\frac{1}{2"}], level_4_5=EASY[:1])
    assert bigmath.main(["--local-dir", str(source), "--out", str(tmp_path / "out")]) == 0
    first, second = read(tmp_path / "out" / "level_3_4_5.parquet")
    assert len(read(tmp_path / "out" / "level_4_5.parquet")) == 1
    said = capsys.readouterr().out
    assert "level_3_4_5.parquet: 2 problems" in said
    assert "level_3_4_5: 1 left out whose answers have unbalanced braces" in said
    (turn,) = first["prompt"]
    assert turn == {"role": "user", "content": f"What is $1 + 1$?\n\n{INSTRUCTION}"} and "\\boxed{}" in INSTRUCTION
    for row, answer in ((first, "2"), (second, "\\frac{x}{2}")):
        truth = row["reward_model"]["ground_truth"]
        assert compute_score(row["data_source"], f"so it is \\boxed{{{answer}}}.", truth, row["extra_info"]) == 1
        assert compute_score(row["data_source"], f"so it is \\boxed{{{answer}1}}.", truth) == 0
        assert compute_score(row["data_source"], f"so it is {answer}.", truth) == 0


def test_one_level_alone(tmp_path):
    source = write(tmp_path, level_4_5=EASY)
    assert bigmath.main(["--local-dir", str(source), "--out", str(tmp_path / "out"), "--level", "level_4_5"]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["level_4_5.parquet"]


@pytest.mark.parametrize(("answer", "whole"), [("033", "33"), ("27.0", "27"), ("0", "0"), ("2.5", "2.5"), ("x", "x")])
def test_benchmarks_have_whole_numbers_as_models_write_them(tmp_path, answer, whole):
    examples = [{"question": "Q", "answer": answer, "solution": "long"}]
    source = write(tmp_path, **{name: examples for name in math_benchmarks.BENCHMARKS})
    assert math_benchmarks.main(["--local-dir", str(source), "--out", str(tmp_path / "out")]) == 0
    for name in math_benchmarks.BENCHMARKS:
        (row,) = read(tmp_path / "out" / f"{name}.parquet")
        assert (row["data_source"], row["reward_model"]["ground_truth"]) == (name, whole)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "not JSON"),
        ('["a"]', "expected an object, got list"),
        ({"prompt": "Why?"}, "it has none of `solution`, `answer`"),
        ({"solution": "1"}, "it has none of `prompt`, `problem`, `question`"),
        ({"prompt": " ", "solution": "1"}, "`prompt` is empty"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written_for_it(tmp_path, capsys, line, complaint):
    source = write(tmp_path, level_3_4_5=[EASY[0], line])
    assert bigmath.main(["--local-dir", str(source), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{source / 'level_3_4_5.jsonl'}:2: " in error and complaint in error
    assert not (tmp_path / "out" / "level_3_4_5.parquet").exists()


def test_a_missing_file_is_named(tmp_path, capsys):
    assert math_benchmarks.main(["--local-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "math500.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "can"), [("{}", True), ("}{", False), ("\\frac{1}{2", False), ("7", True)])
def test_answers_without_balanced_braces_cannot_be_read_back(answer, can):
    assert can_be_boxed(answer) is can
    assert can is (compute_score("bigmath", f"\\boxed{{{answer}}}", answer) == 1)


def test_verl_loads_the_reward_by_the_name_that_the_recipes_give():
    from verl.trainer.ppo.reward import get_custom_reward_fn

    node = {"path": "pkg://qerl_verl.data.math_score", "name": "compute_score"}
    reward = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": node}}))
    assert reward("bigmath", "\\boxed{3}", "3") == 1.0
