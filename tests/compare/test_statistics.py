"""Tests intervals over runs, and the moving average."""

import math

import numpy as np
import pytest

from qerl_verl.compare.statistics import Bootstrap, moving_average, two_sided_p

NAN, INF = math.nan, math.inf


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    """Checks 400 samples of 40 values each; the percentile interval of so many values is nearly
    exact.
    """
    rng = np.random.default_rng(3)
    bootstrap = Bootstrap(samples=800, confidence=0.9)
    intervals = [bootstrap.mean(rng.exponential(size=40), f"arm {i}") for i in range(400)]
    covered = np.mean([i.low <= 1.0 <= i.high for i in intervals])
    assert 0.84 < covered < 0.93


def test_the_limits_are_those_of_all_resamples():
    """A resample of two runs is one of four, so the limits are the runs themselves."""
    interval = Bootstrap().mean(np.array([0.2, 0.6]), "a")
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.4, 0.2, 0.6))


MEANS = {
    "one run": ([0.5], 0.5, False, 1),
    "none": ([NAN, NAN], NAN, False, 0),
    "one has it": ([NAN, 0.5], 0.5, False, 1),
    "two of three": ([0.4, NAN, 0.6], 0.5, True, 2),
}


@pytest.mark.parametrize(("values", "value", "has_interval", "runs"), MEANS.values(), ids=MEANS.keys())
def test_runs_without_the_value_are_left_out_and_one_run_has_no_interval(values, value, has_interval, runs):
    interval = Bootstrap().mean(np.array(values), "a")
    assert interval.value == pytest.approx(value, nan_ok=True)
    assert (interval.has_interval, interval.runs) == (has_interval, runs)


MEDIANS = {
    "odd": ([30.0, 10.0, 20.0], 20.0),
    "even": ([30.0, 10.0, 20.0, 40.0], 20.0),
    "most got there": ([30.0, INF, 20.0], 30.0),
    "most did not": ([30.0, INF, INF], INF),
    "one": ([30.0], 30.0),
}


@pytest.mark.parametrize(("values", "median"), MEDIANS.values(), ids=MEDIANS.keys())
def test_what_never_happened_is_later_than_all_that_did(values, median):
    interval = Bootstrap().median(np.array(values), "a")
    assert interval.value == median
    if len(values) > 1:
        assert interval.low == min(values) and interval.high == max(values)


def test_intervals_are_the_same_each_time_and_those_of_two_arms_independent():
    values, bootstrap = np.random.default_rng(0).normal(size=5), Bootstrap()
    assert bootstrap.mean(values, "a") == bootstrap.mean(values, "a") == Bootstrap().mean(values, "a")
    assert bootstrap.mean(values, "a") != Bootstrap(seed=1).mean(values, "a")
    drawn = [bootstrap._counts(5, name) @ values for name in ("a", "b")]
    assert abs(np.corrcoef(*drawn)[0, 1]) < 0.1


def test_a_difference_of_independent_arms_is_wider_than_either():
    rng = np.random.default_rng(5)
    one, other = (dict(zip("abcdefgh", rng.normal(mean, 1, 8), strict=True)) for mean in (3, 1))
    difference = Bootstrap().difference(one, other, ("one", "other"))
    parts = [Bootstrap().mean(np.array(list(v.values())), n) for v, n in ((one, "one"), (other, "other"))]
    assert difference.value == pytest.approx(parts[0].value - parts[1].value)
    assert difference.high - difference.low > max(p.high - p.low for p in parts)
    assert not Bootstrap().difference({"a": 1.0}, other, ("one", "other")).has_interval
    assert math.isnan(Bootstrap().difference({"a": NAN}, other, ("one", "other")).value)


def test_a_curve_rests_at_each_step_on_the_runs_that_have_it():
    values = np.array([[1.0, 2.0, NAN, NAN], [3.0, NAN, NAN, 5.0]])
    mean, low, high = Bootstrap().curve(values, "a")
    assert mean == pytest.approx([2.0, 2.0, NAN, 5.0], nan_ok=True)
    assert low == pytest.approx([1.0, NAN, NAN, NAN], nan_ok=True)
    assert high == pytest.approx([3.0, NAN, NAN, NAN], nan_ok=True)


def test_a_curve_has_at_each_step_the_interval_of_its_mean():
    # more steps than are resampled at a time
    values = np.random.default_rng(1).normal(size=(4, 700))
    mean, low, high = Bootstrap().curve(values, "a")
    for step in (0, 511, 512, 699):
        expected = Bootstrap().mean(values[:, step], "a")
        assert (mean[step], low[step], high[step]) == pytest.approx((expected.value, expected.low, expected.high))


AVERAGES = {
    "none": ([1, 5, 3], 1, [1, 5, 3]),
    "centred, shorter at the ends": ([1, 5, 3, 7, 9], 3, [1, 3, 5, 19 / 3, 9]),
    "longer than the series": ([1, 5, 3], 9, [1, 3, 3]),
    "gap": ([1, NAN, 3, 4], 3, [1, 2, 3.5, 4]),
    "only gaps": ([NAN, NAN, NAN], 3, [NAN, NAN, NAN]),
}


@pytest.mark.parametrize(("values", "window", "expected"), AVERAGES.values(), ids=AVERAGES.keys())
def test_the_moving_average_is_centred(values, window, expected):
    found = moving_average(np.array([values, values], dtype=float), window)
    assert found[1] == pytest.approx(expected, nan_ok=True)


def test_the_moving_average_keeps_a_straight_line():
    assert moving_average(np.arange(50.0), 11) == pytest.approx(np.arange(50.0))


TABLE = {
    (12.706, 1): 0.05,
    (4.303, 2): 0.05,
    (2.776, 4): 0.05,
    (4.604, 4): 0.01,
    (2.228, 10): 0.05,
    (1.980, 120): 0.05,
}
"""Critical values of Student's t distribution as tables print them: (t, degrees of freedom) ->
p."""


@pytest.mark.parametrize(("at", "p"), TABLE.items())
def test_p_values_are_those_of_students_table(at, p):
    t, freedom = at
    assert two_sided_p(t, 1.0, freedom) == two_sided_p(-2 * t, 2.0, freedom) == pytest.approx(p, rel=2e-3)
    assert two_sided_p(0.0, 1.0, freedom) == pytest.approx(1.0)


def test_chance_is_called_a_difference_as_rarely_as_it_says():
    """With three seeds per arm and no difference, the bootstrap's range excludes 0 in a quarter of
    the cases.
    """
    rng, bootstrap = np.random.default_rng(2), Bootstrap(samples=300)
    paired = [bootstrap.paired_difference(rng.normal(size=3), "a") for _ in range(600)]
    assert np.mean([i.p < 0.05 for i in paired]) == pytest.approx(0.05, abs=0.025)
    assert np.mean([i.low > 0 or i.high < 0 for i in paired]) == pytest.approx(0.25, abs=0.06)
    arms = [[dict(enumerate(rng.normal(size=4) * spread)) for spread in (1, 3)] for _ in range(600)]
    found = [bootstrap.difference(*two, ("a", "b")).p < 0.05 for two in arms]
    assert np.mean(found) == pytest.approx(0.05, abs=0.025)


def test_welchs_degrees_of_freedom():
    """The variances are 5/3 of four values and 22 of five: (5/12 + 22/5)^2 / ((5/12)^2 / 3 +
    (22/5)^2 / 4).
    """
    one, other = dict(enumerate([1.0, 2, 3, 4])), dict(enumerate([2.0, 4, 6, 9, 14]))
    found = Bootstrap().difference(one, other, ("a", "b"))
    t = -4.5 / math.sqrt(5 / 12 + 22 / 5)
    assert found.p == pytest.approx(two_sided_p(t, 1.0, 4.736809), rel=1e-5)
