"""Tests which function scores a response, and with which arguments."""

import pytest

from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.evaluation.problems import Problem
from qerl_verl.evaluation.rewards import OURS, VERL, Reward

CODE = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return float(solution_str == ground_truth)

def graded(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": -1.0, "acc": solution_str == ground_truth, "index": extra_info["index"]}

def without_acc(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": 0.25}

async def slow(data_source, solution_str, ground_truth, extra_info=None):
    return 0.5

def broken(data_source, solution_str, ground_truth, extra_info=None):
    return 1 / 0

def unknown(data_source, solution_str, ground_truth, extra_info=None):
    raise NotImplementedError(data_source)

def text(data_source, solution_str, ground_truth, extra_info=None):
    return "1"

def endless(data_source, solution_str, ground_truth, extra_info=None):
    return float("nan")

def two(solution_str):
    return 1.0
"""


def problem(source="digits", answer="2"):
    return Problem(0, source, [{"role": "user", "content": "?"}], answer, {"index": 7})


@pytest.fixture
def file(tmp_path):
    (tmp_path / "reward.py").write_text(CODE)
    return str(tmp_path / "reward.py")


@pytest.mark.parametrize(
    "source, response, answer, function, value",
    [
        ("openai/gsm8k", "so\n#### 1,200", "1200", VERL, 1.0),
        ("openai/gsm8k", "1200", "1200", VERL, 0.0),
        ("math500", "so \\boxed{\\frac{1}{2}}", "\\frac12", OURS, 1.0),
        ("aime24", "so \\boxed{33}", "33", OURS, 1.0),
        ("bigmath", "33", "33", OURS, 0.0),
        ("HuggingFaceH4/MATH-500", "so \\boxed{2}", "2", VERL, 1.0),
        ("math_dapo", "Answer: 3", "2", VERL, 0.0),  # score -1, acc False
    ],
)
def test_chosen_by_the_data_source(source, response, answer, function, value):
    reward = Reward()
    assert reward.name(source) == function
    assert reward(problem(source, answer), response).value == value


@pytest.mark.parametrize(
    "name, response, value, details",
    [
        ("", "2", 1.0, {}),
        ("", "3", 0.0, {}),
        (":graded", "2", 1.0, {"score": -1.0, "acc": True, "index": 7}),
        (":without_acc", "2", 0.25, {"score": 0.25}),
        (":slow", "2", 0.5, {}),
    ],
)
def test_of_a_file(file, name, response, value, details):
    score = Reward(file + name)(problem(), response)
    assert (score.value, score.details) == (value, details)


def test_of_a_package():
    reward = Reward("pkg://qerl_verl.data.math_score")
    assert reward(problem(answer="2"), "\\boxed{2}").value == 1.0


@pytest.mark.parametrize(
    "name, message",
    [
        ("x", "cannot be loaded from .*FILE:NAME"),
        (":missing", "missing cannot be loaded"),
    ],
)
def test_that_cannot_be_loaded(file, name, message):
    with pytest.raises(EvaluationError, match=message):
        Reward(file + name)


@pytest.mark.parametrize(
    "name, message",
    [
        (":broken", "broken failed on row 0 of digits: ZeroDivisionError"),
        (":unknown", "data_source digits: verl has no reward for it.*--reward-function"),
        (":text", "returned 1 for row 0"),
        (":endless", "returned nan for row 0"),
        (":two", "two failed on row 0 of digits: TypeError"),
        (None, "data_source digits: verl has no reward for it.*--reward-function"),
    ],
)
def test_that_gives_no_score(file, name, message):
    with pytest.raises(EvaluationError, match=message):
        Reward(name and file + name)(problem(), "2")


def test_the_digest_follows_the_file(file, tmp_path):
    (tmp_path / "other.py").write_text(CODE + "\n")
    (tmp_path / "same.py").write_text(CODE)
    assert Reward(file).digest == Reward(str(tmp_path / "same.py")).digest != Reward(str(tmp_path / "other.py")).digest
    assert Reward(file).digest != Reward(f"{file}:graded").digest
