"""Computes intervals over seeds by the percentile bootstrap (Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13), with the runs of an arm as the sample.

Runs are resampled as a whole, because the steps of one run depend on each other. With as few values
as there are seeds, the interval is too narrow: with three values it is their range, which excludes
0 by chance in one of four cases. A difference therefore also has the p value of a t test.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

_COLUMNS = 512
"""Number of steps that are resampled at a time, to bound the memory."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its percentile interval.

    Attributes:
        value: the estimate; NaN where no run has a value, infinite where most runs never reached
            it.
        low, high: limits; NaN where there is no interval.
        runs: number of runs in the estimate.
        p: p value of Student's t test, for a difference; NaN where there is no interval.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    runs: int = 0
    p: float = math.nan

    @property
    def has_interval(self) -> bool:
        return not math.isnan(self.low)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are computed.

    Attributes:
        samples: number of resamples.
        confidence: level of an interval.
        seed: seed of the resampling. The same seed, runs and name give the same interval.
    """

    samples: int = 5000
    confidence: float = 0.95
    seed: int = 0

    def _counts(self, runs: int, name: str) -> np.ndarray:
        """Returns how often each resample draws each run, ``[samples, runs]`` float64.

        ``name`` makes the draws of two arms independent.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        return rng.multinomial(runs, np.full(runs, 1 / runs), size=self.samples).astype(np.float64)

    def _limits(self, estimates: np.ndarray, method: str = "linear") -> np.ndarray:
        tail = (1 - self.confidence) / 2 * 100
        percentile = np.nanpercentile if np.isnan(estimates).any() else np.percentile
        return percentile(estimates, [tail, 100 - tail], axis=0, method=method)

    def mean(self, values: np.ndarray, name: str) -> Interval:
        """Estimates the mean of ``[runs]``; NaN is left out. A single run has no interval."""
        values = values[~np.isnan(values)]
        if len(values) == 0:
            return Interval(math.nan)
        if len(values) == 1:
            return Interval(float(values[0]), runs=1)
        estimates = self._counts(len(values), name) @ values / len(values)
        low, high = self._limits(estimates)
        return Interval(float(values.mean()), float(low), float(high), len(values))

    def median(self, values: np.ndarray, name: str) -> Interval:
        """Estimates the lower median of ``[runs]``, of which some values may be infinite.

        A run that has not reached a level counts as later than all others.
        """
        values = np.sort(values[~np.isnan(values)])
        if len(values) == 0:
            return Interval(math.nan)
        middle = (len(values) - 1) // 2
        if len(values) == 1:
            return Interval(float(values[0]), runs=1)
        drawn = np.cumsum(self._counts(len(values), name), axis=1)
        estimates = values[np.argmax(drawn > middle, axis=1)]
        low, high = self._limits(estimates, method="inverted_cdf")
        return Interval(float(values[middle]), float(low), float(high), len(values))

    def paired_difference(self, pairs: np.ndarray, name: str) -> Interval:
        """Estimates the mean of ``[pairs]`` differences by seed, with the paired t test."""
        found = self.mean(pairs, name)
        if not found.has_interval:
            return found
        error = pairs.std(ddof=1) / math.sqrt(len(pairs))
        return replace(found, p=two_sided_p(found.value, error, len(pairs) - 1))

    def difference(self, one: Mapping[str, float], other: Mapping[str, float], names: tuple[str, str]) -> Interval:
        """Estimates the mean of ``one`` minus the mean of ``other``, with Welch's t test.

        The two are resampled independently.

        Args:
            one, other: run -> value; NaN is left out.
            names: names of the two arms.
        """
        pairs = zip((one, other), names, strict=True)
        parts = [(np.array([v for v in values.values() if not math.isnan(v)]), name) for values, name in pairs]
        if not all(len(values) for values, _ in parts):
            return Interval(math.nan)
        value = float(parts[0][0].mean() - parts[1][0].mean())
        runs = min(len(values) for values, _ in parts)
        if runs < 2:
            return Interval(value, runs=runs)
        estimates = [self._counts(len(values), name) @ values / len(values) for values, name in parts]
        low, high = self._limits(estimates[0] - estimates[1])
        squares = [values.var(ddof=1) / len(values) for values, _ in parts]
        total = sum(squares)
        spread = sum(s**2 / (len(v) - 1) for s, (v, _) in zip(squares, parts, strict=True))
        p = two_sided_p(value, math.sqrt(total), total**2 / spread if spread else 1)
        return Interval(value, float(low), float(high), runs, p)

    def curve(self, values: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the mean, lower and upper limit by step, ``[steps]`` each.

        The limits are pointwise, and NaN for a single run.

        Args:
            values: ``[runs, steps]``. NaN is left out, so a step's mean covers the runs that have
                it.
            name: see :meth:`mean`.
        """
        known = ~np.isnan(values)
        filled = np.where(known, values, 0.0)
        count = known.sum(axis=0)
        mean = np.divide(filled.sum(axis=0), count, out=np.full(count.shape, np.nan), where=count > 0)
        low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
        if len(values) > 1:
            counts = self._counts(len(values), name)
            for start in range(0, values.shape[1], _COLUMNS):
                part = slice(start, start + _COLUMNS)
                weight = counts @ known[:, part]
                sums = counts @ filled[:, part]
                estimates = np.divide(sums, weight, out=np.full(sums.shape, np.nan), where=weight > 0)
                enough = count[part] > 1
                if enough.any():
                    columns = np.flatnonzero(enough) + start
                    low[columns], high[columns] = self._limits(estimates[:, enough])
        return mean, low, high


def two_sided_p(value: float, error: float, freedom: float) -> float:
    """Returns the p value of Student's t distribution.

    With x = sqrt(freedom) tan(angle) the density is proportional to cos(angle)^(freedom - 1), which
    is integrated by Simpson's rule.

    Args:
        value: the estimate.
        error: its standard error.
        freedom: degrees of freedom, at least 1.
    """
    if error == 0:
        return 1.0 if value == 0 else 0.0
    angle = math.atan(abs(value / error) / math.sqrt(freedom))
    angles = np.linspace(angle, math.pi / 2, 2001)
    weights = np.ones(2001)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    heights = np.clip(np.cos(angles), 0, 1) ** (freedom - 1)
    tail = weights @ heights * (angles[1] - angles[0]) / 3
    whole = math.sqrt(math.pi) * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    return float(min(1.0, 2 * tail / whole))


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Returns the centred moving average over the last axis, without NaN.

    At the ends the window is shorter but stays centred, so the first and last value are unchanged.

    Args:
        values: ``[..., steps]``.
        window: odd number of steps; 1 changes nothing.
    """
    if window <= 1:
        return values.copy()
    half, steps = window // 2, values.shape[-1]
    known = ~np.isnan(values)
    zero = np.zeros((*values.shape[:-1], 1))
    sums = np.concatenate([zero, np.cumsum(np.where(known, values, 0.0), axis=-1)], axis=-1)
    counts = np.concatenate([zero, np.cumsum(known, axis=-1)], axis=-1)
    at = np.arange(steps)
    reach = np.minimum(half, np.minimum(at, steps - 1 - at))
    total = sums[..., at + reach + 1] - sums[..., at - reach]
    count = counts[..., at + reach + 1] - counts[..., at - reach]
    return np.divide(total, count, out=np.full(values.shape, np.nan), where=count > 0)
