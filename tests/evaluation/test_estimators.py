"""Tests pass@k against enumeration, and the coverage of the bootstrap interval."""

from itertools import combinations

import numpy as np
import pytest

from qerl_verl.evaluation.estimators import estimate, pass_at_k


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(samples):
    for k in range(1, samples + 1):
        for right in range(samples + 1):
            subsets = list(combinations([True] * right + [False] * (samples - right), k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(samples, np.array([right]), k)[0] == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "samples, right, k, expected",
    [(2000, 1, 1000, 0.5), (2000, 0, 7, 0.0), (2000, 2000, 7, 1.0), (2000, 1, 1, 1 / 2000), (10_000, 5_000, 100, 1.0)],
)
def test_pass_at_k_of_many_responses(samples, right, k, expected):
    assert pass_at_k(samples, np.array([right]), k)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("samples, right, k", [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses_what_cannot_be(samples, right, k):
    with pytest.raises(ValueError):
        pass_at_k(samples, np.array([right]), k)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    for confidence in (0.8, 0.95):
        found = [estimate(generator.random(150) < 0.3, confidence, resamples=400, seed=i) for i in range(400)]
        covered = np.mean([e.low <= 0.3 <= e.high for e in found])
        assert abs(covered - confidence) < 0.05


def test_an_estimate_is_the_mean_and_the_same_each_time():
    values = np.random.default_rng(2).random(1500)
    first, second = estimate(values), estimate(values)
    assert first == second and first.value == values.mean() and first.low < first.value < first.high
    assert first.high - first.low == pytest.approx(2 * 1.96 * values.std() / 1500**0.5, rel=0.05)


def test_a_single_problem_has_no_interval():
    found = estimate(np.array([0.25]))
    assert (found.value, found.low, found.high) == (0.25, None, None)


@pytest.mark.parametrize("values", [[0.0] * 2, [1.0] * 9])
def test_equal_values_have_an_interval_without_width(values):
    assert estimate(np.array(values)).low == estimate(np.array(values)).high == values[0]
