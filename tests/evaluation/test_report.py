"""Tests results from responses, and their table."""

import json

import pytest

from qerl_verl.evaluation.report import as_json, format_table, summarize
from qerl_verl.evaluation.responses import Response


def rows(*scores, **values):
    """Returns responses with the given scores, by problem."""
    fields = dict(policy="p", data="d", seed=0, tokens=10, finish="stop", text="", details={})
    return [
        [Response(**{**fields, "index": i, "sample": j, "score": s, **values}) for j, s in enumerate(row)]
        for i, row in enumerate(scores)
    ]


def summary(responses, policy="base", **arguments):
    settings = dict(ks=(1, 2), correct_from=1.0, confidence=0.95)
    return summarize(policy, "d", "s", "verl", responses, **{**settings, **arguments})


def test_pass_at_k_score_length_and_share_that_was_cut_off():
    responses = rows([1, 0], [1, 1], [0, 0]) + rows([0.5, 1], tokens=20, finish="length")
    result, values = summary(responses)
    assert (result.problems, result.samples) == (4, 2)
    assert result.pass_at[1].value == pytest.approx(0.5) and result.pass_at[2].value == pytest.approx(0.75)
    assert result.score.value == pytest.approx(4.5 / 8)
    assert (result.tokens, result.cut_off) == (12.5, 0.25)
    assert values[2].tolist() == [1, 1, 0, 1]
    assert summary(responses, correct_from=0.5)[0].pass_at[1].value == pytest.approx(5 / 8)


def test_the_difference_is_taken_problem_by_problem():
    """Two policies with the same difference on every problem have that difference with
    certainty."""
    first, values = summary(rows([1, 0], [0, 0], [1, 0], [0, 0]), ks=(1,))
    second, _ = summary(rows([1, 1], [1, 0], [1, 1], [1, 0]), "a", ks=(1,), first=values)
    assert first.difference == {}
    found = second.difference[1]
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    assert second.pass_at[1].low < second.pass_at[1].high


def test_json_and_table():
    first, values = summary(rows([1, 0], [0.5, 0]))
    second, _ = summary(rows([1, 1], [0, 0]), "runs/a/global_step_10", first=values)
    found = json.loads(json.dumps(as_json(second)))
    assert found["pass@1"]["value"] == 0.5 and found["difference of pass@2"]["value"] == 0.0
    assert "pass_at" not in found and "difference" not in found
    lines = format_table([first, second]).splitlines()
    assert lines[0].split()[:4] == ["policy", "data", "problems", "samples"] and "vs base, pass@1" in lines[0]
    assert "mean score" in lines[0] and "0.375" in lines[2]
    assert "50.0 [0.0, 100.0]" in lines[3] and "+25.0 [+0.0, +50.0]" in lines[3]


def test_the_table_leaves_out_what_says_nothing():
    head = format_table([summary(rows([1, 0]))[0]]).splitlines()[0]
    assert "vs" not in head and "mean score" not in head


@pytest.mark.parametrize(
    "names, shown",
    [
        (["base", "runs/a/global_step_10"], ["base", "runs/a/global_step_10"]),
        (["base", "runs/a/s_10", "runs/a/s_20"], ["base", "s_10", "s_20"]),
        (["runs/a_1/s_10", "runs/a_2/s_10"], ["a_1/s_10", "a_2/s_10"]),
        (["/x/a", "/y/a", "a"], ["x/a", "y/a", "a"]),
    ],
)
def test_names_without_the_folders_that_they_share(names, shown):
    table = format_table([summary(rows([1, 0], [0, 0]), name)[0] for name in names]).splitlines()
    assert [line.split()[0] for line in table[2:]] == shown
