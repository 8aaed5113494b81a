"""Estimates pass@k and its confidence interval."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

RESAMPLES = 10_000
_CHUNK = 1 << 20  # indices that are drawn at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Attributes:
        value: the mean.
        low: lower end of its confidence interval; None for a single problem, which has none.
        high: upper end.
    """

    value: float
    low: float | None
    high: float | None


def pass_at_k(samples: int, solved: np.ndarray, k: int) -> np.ndarray:
    """Returns the unbiased estimate of the probability that one of k responses is right.

    It is 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, equation 1), computed with integers.

    Args:
        samples: n, the number of responses to each problem.
        solved: ``[problems]`` int, c, the number of right responses.
        k: 1 to n.

    Returns:
        ``[problems]`` float64.

    Raises:
        ValueError: k, or a number of right responses, is outside 0 to n.
    """
    solved = np.asarray(solved)
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} responses to a problem, there are {samples}")
    if solved.size and not 0 <= solved.min() <= solved.max() <= samples:
        raise ValueError(f"{solved.min()} to {solved.max()} right responses of {samples}")
    subsets = comb(samples, k)
    table = [(subsets - comb(samples - right, k)) / subsets for right in range(samples + 1)]
    return np.array(table)[solved]


def estimate(values: np.ndarray, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Returns the mean over problems with a percentile bootstrap interval.

    The interval says how the mean would vary with other problems of the same kind. It has no width
    where all values are equal. For the difference of two policies on the same problems, pass the
    differences.

    Args:
        values: ``[problems]`` float.
        confidence: level of the interval, between 0 and 1.
        resamples: number of resamples, each of as many problems, with replacement.
        seed: seed of the resampling.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 1:
        return Estimate(float(values[0]), None, None)
    generator, means = np.random.default_rng(seed), []
    rows = max(1, _CHUNK // len(values))
    for begin in range(0, resamples, rows):
        drawn = generator.integers(len(values), size=(min(rows, resamples - begin), len(values)))
        means.append(values[drawn].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(values.mean()), float(low), float(high))
