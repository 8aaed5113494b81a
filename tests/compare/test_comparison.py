"""Tests final values, differences, curves, and messages about runs that do not fit together."""

import json
import math

import numpy as np
import pytest

from qerl_verl.compare.arms import group_runs
from qerl_verl.compare.comparison import Options, area, compare, first_step_at, to_json
from qerl_verl.compare.errors import CompareError
from qerl_verl.compare.runs import SCORE
from qerl_verl.compare.statistics import Bootstrap

ENTROPY, VALIDATION = "actor/entropy", "val-core/openai/gsm8k/acc/mean@1"
NAN = math.nan


def of(folder, **options):
    grouping = group_runs([f"{folder}/*"])
    return compare(grouping.arms, Options(**options), grouping.notes)


def quantity(comparison, id):
    (found,) = [q for q in comparison.quantities if q.id == id]
    return found


def ramp(end: float, steps: int = 20) -> list[float]:
    """Returns values from end / steps to end, in equal steps."""
    return [end * (i + 1) / steps for i in range(steps)]


def test_the_values_of_an_arm_are_means_over_its_runs(tmp_path, make_run):
    for seed, end in ((1, 0.4), (2, 0.6)):
        make_run(f"a_s{seed}", {SCORE: ramp(end), ENTROPY: ramp(-end)})
    comparison = of(tmp_path, window=5)
    expected = {
        "reward/first": 0.5 * np.mean([1, 2, 3, 4, 5]) / 20,
        "reward/last": 0.5 * np.mean([16, 17, 18, 19, 20]) / 20,
        "reward/area": 0.5 * 10.5 / 20,
        f"{ENTROPY}/first": -0.5 * 3 / 20,
        f"{ENTROPY}/last": -0.5 * 18 / 20,
        f"{ENTROPY}/whole": -0.5 * 10.5 / 20,
    }
    for id, value in expected.items():
        interval = quantity(comparison, id).arms["a"]
        assert interval.value == pytest.approx(value) and interval.runs == 2
        assert (interval.low, interval.high) == pytest.approx(sorted((0.8 * value, 1.2 * value)))


def test_one_run_has_no_interval_and_that_is_said(tmp_path, make_run):
    make_run("a", ramp(1.0))
    make_run("b_s1", 0.1)
    make_run("b_s2", 0.2)
    comparison = of(tmp_path)
    last = quantity(comparison, "reward/last")
    assert not last.arms["a"].has_interval and last.arms["b"].has_interval
    assert not last.differences["b"].interval.has_interval
    assert "one run only, so no interval: a" in comparison.notes
    assert any("fewer than 5 runs" in note and note.endswith(": b") for note in comparison.notes)


def test_seeds_that_two_arms_share_are_compared_in_pairs(tmp_path, make_run):
    """The seeds differ by far more than the arms do, so only pairs show the difference."""
    for seed in (1, 2, 3):
        make_run(f"base_s{seed}", 0.2 * seed)
        make_run(f"paired_s{seed}", 0.2 * seed + 0.01)
        make_run(f"other_s{seed + 6}", 0.2 * seed + 0.01)
    make_run("base_s4", 0.9)
    last = quantity(of(tmp_path, baseline="base"), "reward/last")
    paired, other = last.differences["paired"], last.differences["other"]
    assert paired.paired == (1, 2, 3) and not other.paired and last.differences.keys() == {"paired", "other"}
    assert paired.interval.value == pytest.approx(0.01) and 0 < paired.interval.low <= paired.interval.high < 0.02
    assert other.interval.value == pytest.approx(0.41 - 0.525) and other.interval.low < 0 < other.interval.high


REACH = {
    "exactly": (ramp(1.0), 0.5, 1, 10),
    "at once": (ramp(1.0), 0.01, 1, 1),
    "never": (ramp(1.0), 1.1, 1, math.inf),
    "a peak does not count": ([0, 1, 0, 0, 0, 0, 0.4, 0.5, 0.6, 0.7], 0.4, 3, 8),
    "not a number": ([NAN, NAN, 1, 1], 1, 1, 3),
}


@pytest.mark.parametrize(("rewards", "level", "smooth", "step"), REACH.values(), ids=REACH.keys())
def test_steps_to_a_reward(rewards, level, smooth, step):
    found = first_step_at(np.array(rewards, dtype=float), list(range(1, len(rewards) + 1)), level, smooth)
    assert found == step


def test_steps_to_a_reward_that_some_runs_never_reach(tmp_path, make_run):
    for seed, end in ((1, 1.0), (2, 0.8), (3, 0.4)):
        make_run(f"a_s{seed}", {SCORE: ramp(end)})
        make_run(f"b_s{seed}", {SCORE: ramp(1.0)})
    comparison = of(tmp_path, baseline="b", reach=(0.5, 0.2), smooth=1)
    late, early = (quantity(comparison, f"reward/reach/{level}") for level in (0.5, 0.2))
    assert late.values["a"] == {"a_s1": 10, "a_s2": 13, "a_s3": math.inf} and late.arms["a"].value == 13
    assert math.isnan(late.differences["a"].interval.value)
    assert early.differences["a"].interval.value == pytest.approx(np.mean([4, 5, 10]) - 4)
    found = json.loads(json.dumps(to_json(comparison), allow_nan=False))
    (written,) = [q for q in found["quantities"] if q["id"] == "reward/reach/0.5"]
    assert written["arms"]["a"]["by_run"] == {"a_s1": 10, "a_s2": 13, "a_s3": None}


def test_the_reward_to_reach_is_the_baselines_last_unless_it_is_given(tmp_path, make_run):
    make_run("a", {SCORE: ramp(1.0)})
    make_run("b", 0.4)
    reached = next(q for q in of(tmp_path, baseline="b", smooth=1).quantities if q.steps)
    assert reached.label == "steps to 0.4 (b's last)" and reached.arms["a"].value == 8


AREAS = {
    "constant": ([2, 2, 2], [1, 2, 3], 2),
    "line": ([0, 1, 2], [1, 2, 3], 1),
    "uneven steps": ([0, 1, 1], [1, 2, 4], (0.5 + 2) / 3),
    "gap": ([0, NAN, 2], [1, 2, 3], 1),
    "one": ([3], [1], 3),
    "none": ([NAN], [1], NAN),
}


@pytest.mark.parametrize(("values", "steps", "expected"), AREAS.values(), ids=AREAS.keys())
def test_the_area_under_a_curve_is_its_mean_height(values, steps, expected):
    assert area(np.array(values, dtype=float), steps) == pytest.approx(expected, nan_ok=True)


def test_validations_are_compared_at_the_first_and_the_last_step_that_all_runs_have(tmp_path, make_run):
    make_run(
        "a",
        {
            SCORE: ramp(1.0),
            VALIDATION: [0.1, 0.2, 0.3],
            "val-core/openai/gsm8k/acc/best@4/mean": 1.0,
        },
    )
    make_run("b", {SCORE: ramp(1.0), VALIDATION: [0.2, 0.3]})
    comparison = of(tmp_path)
    last = quantity(comparison, f"{VALIDATION}/last")
    assert last.label == "validation openai/gsm8k, acc mean@1, step 2"
    assert (last.arms["a"].value, last.arms["b"].value) == (0.2, 0.3)
    assert quantity(comparison, f"{VALIDATION}/first").arms["a"].value == 0.1
    assert not [q for q in comparison.quantities if "best@4" in q.id]


SECONDS = {
    "timing_s/step": [9.0] + [3.0] * 19,
    "timing_s/gen": 2.0,
    "timing_s/save_checkpoint": [1.0] * 2,
}


def test_seconds_are_medians_and_what_few_steps_do_is_no_part_of_one(tmp_path, make_run):
    make_run("a", {SCORE: 0.5, **SECONDS})
    comparison = of(tmp_path)
    assert {q.id: q.arms["a"].value for q in comparison.group("seconds")} == {
        "timing_s/step": 3.0,
        "timing_s/gen": 2.0,
    }


def test_a_metric_of_the_users_choice_is_shown_and_one_that_an_arm_lacks_is_empty(tmp_path, make_run):
    make_run("a", {SCORE: 0.5, "my/metric": 7.0, "qerl/aqn_sigma_effective": 0.01})
    make_run("b", {SCORE: 0.5, "my/metric": 8.0})
    comparison = of(tmp_path, more=("my/metric",))
    assert quantity(comparison, "my/metric/last").arms["b"].value == 8
    assert math.isnan(quantity(comparison, "qerl/aqn_sigma_effective/last").arms["b"].value)
    assert comparison.curves["my/metric"].keys() == {"a", "b"}
    assert comparison.curves["qerl/aqn_sigma_effective"].keys() == {"a"}


def test_curves_are_smoothed_but_not_the_noise(tmp_path, make_run):
    stages = [0.0] * 10 + [1.0] * 10
    make_run("a", {SCORE: stages, "qerl/aqn_sigma": stages})
    curves = of(tmp_path, smooth=5).curves
    assert curves[SCORE]["a"].mean[8:12] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert list(curves["qerl/aqn_sigma"]["a"].mean) == stages


LENGTHS = {
    "same": ([20, 20], {}, (1, 20), []),
    "different": (
        [20, 12],
        {},
        (1, 12),
        ["steps 1 to 12 are compared, which all runs have: b ends there"],
    ),
    "up to": ([20, 12], {"up_to": 8}, (1, 8), []),
    "short one left out": (
        [20, 3],
        {"min_steps": 10},
        (1, 20),
        ["b is left out: it has 3 training steps"],
    ),
}


@pytest.mark.parametrize(("lengths", "options", "span", "said"), LENGTHS.values(), ids=LENGTHS.keys())
def test_runs_of_different_length(tmp_path, make_run, lengths, options, span, said):
    for name, length in zip("ab", lengths, strict=True):
        make_run(name, {SCORE: ramp(1.0, length)})
    comparison = of(tmp_path, **options)
    assert (comparison.steps[0], comparison.steps[-1]) == span
    notes = [note for note in comparison.notes if "steps" in note]
    assert len(notes) == len(said) and all(s in n for s, n in zip(said, notes, strict=True))


def test_values_that_are_no_numbers_are_left_out_of_the_means(tmp_path, make_run):
    make_run("a", {SCORE: [0.5] * 18 + [None, 0.7], ENTROPY: [None] * 20})
    comparison = of(tmp_path, window=2)
    assert quantity(comparison, "reward/last").arms["a"].value == pytest.approx(0.7)
    assert not [q for q in comparison.quantities if ENTROPY in q.id]
    json.dumps(to_json(comparison), allow_nan=False)


def test_missing_steps_are_said(tmp_path, make_run):
    make_run("a", 0.5)
    path = make_run("b", 0.5) / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[i] for i in range(20) if i not in (4, 7)))
    assert "steps that are missing: 2 in b" in of(tmp_path).notes


def test_few_steps_are_not_counted_twice(tmp_path, make_run):
    make_run("a", {SCORE: ramp(1.0, 5)})
    comparison = of(tmp_path)
    assert comparison.window == 2
    make_run("b", {SCORE: ramp(1.0, 1)})
    assert of(tmp_path).window == 1


SETTINGS = {"data.train_batch_size": 8, "qerl.arm": "nvfp4"}
REFUSED = {
    "other data": (
        {"settings": SETTINGS | {"data.train_batch_size": 9}},
        {},
        "data.train_batch_size is 8 (a) and 9 (b)",
    ),
    "unknown baseline": ({}, {"baseline": "c"}, "--baseline c: the arms are a, b"),
    "no training step": (
        {"metrics": {"x": 1.0}},
        {},
        "logged no training step (no critic/score/mean)",
    ),
    "reward under another name": ({}, {"reward": "critic/other"}, "it has critic/score/mean"),
    "all too short": ({}, {"min_steps": 50}, "no run has 50 training steps"),
    "nothing up to there": (
        {},
        {"up_to": 0},
        "no training step is common to all runs (steps: a 1 to 20, b 1 to 20)",
    ),
}


@pytest.mark.parametrize(("run", "options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_runs_that_cannot_be_compared_are_refused(tmp_path, make_run, run, options, message):
    make_run("a", settings=SETTINGS)
    make_run("b", **{"settings": SETTINGS} | run)
    with pytest.raises(CompareError) as error:
        of(tmp_path, **options)
    assert message in str(error.value)


def test_a_difference_that_is_allowed_is_named_first(tmp_path, make_run):
    make_run("a", settings=SETTINGS)
    make_run("b", settings=SETTINGS | {"data.train_batch_size": 9, "qerl.arm": "bf16"})
    comparison = of(tmp_path, allow_differences=True)
    assert comparison.notes[0] == "NOT THE SAME: data.train_batch_size is 8 (a) and 9 (b)"
    assert comparison.agreement.differing == {"qerl.arm": {"a": "nvfp4", "b": "bf16"}}
    found = to_json(comparison)
    assert found["conflicts"] == comparison.agreement.conflicts and found["settings"] == comparison.agreement.differing


def test_intervals_do_not_depend_on_the_other_arms(tmp_path, make_run):
    for seed in range(4):
        make_run(f"1/a_s{seed}", 0.1 * seed**2)
        make_run(f"2/b_s{seed}", 0.1 * seed)
    alone = quantity(of(tmp_path / "1"), "reward/last").arms["a"]
    grouping = group_runs([str(tmp_path / "2"), str(tmp_path / "1")])
    together = compare(grouping.arms, Options(bootstrap=Bootstrap()))
    assert quantity(together, "reward/last").arms["a"] == alone
