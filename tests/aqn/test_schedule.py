"""Tests the noise schedule against the formulas of the paper, written out by hand."""

import math

import pytest

from qerl_verl.aqn.schedule import AQNSchedule
from qerl_verl.config.settings import AQNSettings


def schedule(total_steps=100, **settings):
    return AQNSchedule(AQNSettings(**settings), total_steps)


def test_stages_have_equal_length_and_the_first_is_clean():
    s = schedule(total_steps=100, num_stages=10)
    assert [s.stage(step) for step in (1, 10, 11, 20, 91, 100)] == [0, 0, 1, 1, 9, 9]
    assert [sum(s.stage(step) == k for step in range(1, 101)) for k in range(10)] == [10] * 10
    assert all(s.sigma(step) == 0.0 for step in range(1, 11))
    assert all(s.sigma(step) > 0.0 for step in range(11, 101))


@pytest.mark.parametrize("name", ["exponential", "linear", "cosine", "logarithmic"])
def test_starts_at_sigma_start_ends_at_sigma_end_and_falls(name):
    s = schedule(schedule=name, sigma_start=0.05, sigma_end=0.0005, num_stages=8)
    sigmas = [s.sigma_of_stage(k) for k in range(1, 8)]
    assert sigmas[0] == pytest.approx(0.05, rel=1e-12)
    assert sigmas[-1] == 0.0005
    assert all(a > b for a, b in zip(sigmas, sigmas[1:]))


def test_schedules_between_the_ends():
    middle = {
        "exponential": math.sqrt(0.04 * 0.0001),
        "linear": (0.04 + 0.0001) / 2,
        "cosine": (0.04 + 0.0001) / 2,
        "logarithmic": 0.04 + (0.0001 - 0.04) * math.log(1 + (math.e - 1) / 2),
    }
    for name, expected in middle.items():
        # stages 0 | 1 2 3
        s = schedule(schedule=name, sigma_start=0.04, sigma_end=0.0001, num_stages=4)
        assert s.sigma_of_stage(2) == pytest.approx(expected, rel=1e-12), name


def test_exponential_is_equation_8_reaching_its_end():
    s = schedule(sigma_start=1e-2, sigma_end=5e-4, num_stages=10)
    ratios = [s.sigma_of_stage(k + 1) / s.sigma_of_stage(k) for k in range(1, 9)]
    assert ratios == pytest.approx([(5e-4 / 1e-2) ** (1 / 8)] * 8, rel=1e-9)


def test_two_stages_have_one_noisy_one_at_sigma_end():
    s = schedule(num_stages=2, total_steps=10)
    assert [s.sigma(step) for step in (5, 6)] == [0.0, 5e-4]


def test_fewer_steps_than_stages_is_one_stage_a_step():
    s = schedule(total_steps=3, num_stages=10, sigma_start=0.01, sigma_end=0.001)
    assert [s.sigma(step) for step in (1, 2, 3)] == [0.0, pytest.approx(0.01), 0.001]
    assert schedule(total_steps=1).sigma(1) == 0.0


def test_steps_past_the_end_stay_in_the_last_stage_and_step_zero_is_an_error():
    s = schedule(total_steps=20, num_stages=10)
    assert s.stage(999) == 9 and s.sigma(999) == 5e-4
    with pytest.raises(ValueError, match="count from 1"):
        s.stage(0)
    with pytest.raises(ValueError, match="at least one"):
        schedule(total_steps=0)


def test_switched_off_means_no_noise_anywhere():
    s = schedule(enable=False)
    assert {s.sigma(step) for step in range(1, 101)} == {0.0}
