"""Tests the closed loop on a policy of known divergence, quadratic in sigma plus a constant."""

import json
import math

import pytest

from qerl_verl.aqn.adaptive import KEPT_STEPS, MAX_FACTOR, AdaptiveSigma
from qerl_verl.config.settings import AQNSettings

SETTINGS = AQNSettings(schedule="adaptive", target_kl=1e-3, sigma_start=1e-2, sigma_end=5e-4)


def divergence(sigma, slope=100.0, floor=1e-4):
    return floor + slope * sigma**2


def run(steps, delay=0, loop=None, first=1, measure=divergence):
    """Runs the loop as a trainer does.

    With ``delay``, the samples of a step were drawn that many steps before.
    """
    loop = loop or AdaptiveSigma(SETTINGS)
    for step in range(first, first + steps):
        drawn = loop.sigma(max(1, step - delay))
        loop.update(step, measure(drawn), [drawn] * 4)
    return loop


WANTED = math.sqrt((SETTINGS.target_kl - 1e-4) / 100.0)


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_sigma_settles_where_the_divergence_is_the_target_also_on_stale_samples(delay):
    loop = run(40, delay)
    sigmas = [loop.sigma(step) for step in range(1, 42)]
    assert sigmas[0] == SETTINGS.sigma_end
    # and it does not overshoot
    assert sigmas[-1] == pytest.approx(WANTED, rel=0.01) and max(sigmas) < 1.1 * WANTED
    assert all(b <= MAX_FACTOR * a * 1.0001 for a, b in zip(sigmas, sigmas[1:]))


def test_a_sigma_that_is_too_large_comes_down():
    loop = AdaptiveSigma(SETTINGS, {1: SETTINGS.sigma_start})
    assert run(20, loop=loop).sigma(21) == pytest.approx(WANTED, rel=0.01)


@pytest.mark.parametrize(
    ("measured", "end"),
    [(1e-9, SETTINGS.sigma_start), (0.0, SETTINGS.sigma_start), (10.0, SETTINGS.sigma_end)],
)
def test_sigma_stays_within_its_bounds(measured, end):
    loop = run(30, measure=lambda sigma: measured)
    assert loop.sigma(31) == end
    assert all(SETTINGS.sigma_end <= s <= SETTINGS.sigma_start for s in loop.sigmas.values())


@pytest.mark.parametrize("measured", [math.nan, math.inf])
def test_nothing_is_learned_from_a_divergence_that_is_not_finite(measured):
    loop = run(10)
    before = loop.sigma(11)
    assert loop.update(11, measured, [before]) == before
    assert loop.update(12, 1e-3, []) == before


def test_a_resumed_loop_goes_on_as_the_one_that_was_saved():
    whole = run(12, delay=2)
    half = run(6, delay=2)
    resumed = AdaptiveSigma(SETTINGS)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    run(6, delay=2, loop=resumed, first=7)
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    "state",
    [{}, {"sigmas": [1]}, {"sigmas": {"a": 1}}, {"sigmas": {"1": None}}, [], {"sigmas": {}}],
)
def test_a_damaged_state_is_refused(state):
    with pytest.raises(ValueError, match="no noise levels by step in"):
        AdaptiveSigma(SETTINGS).load_state_dict(state)


def test_old_steps_are_forgotten_and_stale_samples_get_the_oldest_known():
    loop = run(KEPT_STEPS + 50)
    assert len(loop.sigmas) == KEPT_STEPS + 1
    assert loop.sigma(1) == loop.sigmas[min(loop.sigmas)]


def test_switched_off_means_no_noise():
    assert AdaptiveSigma(AQNSettings(enable=False, schedule="adaptive", target_kl=1e-3)).sigma(5) == 0.0
