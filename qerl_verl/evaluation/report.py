"""Reports the results of an evaluation: a table for the terminal, a JSON object for programs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qerl_verl.evaluation.estimators import Estimate, estimate, pass_at_k
from qerl_verl.evaluation.responses import Response


@dataclass(frozen=True)
class Result:
    """The result of one policy on one data source of one data set.

    Attributes:
        policy: name of the adapter, or of the model without one.
        data: name of the data set.
        source: verl's ``data_source``.
        reward: name of the function that scored it.
        problems: number of problems.
        samples: number of responses to each.
        pass_at: k -> pass@k.
        difference: k -> pass@k minus that of the first policy, problem by problem; empty for the
            first.
        score: mean of the scores, which verl's validation calls ``mean@N``.
        tokens: mean number of tokens of a response.
        cut_off: fraction of responses that reached the largest number of tokens.
    """

    policy: str
    data: str
    source: str
    reward: str
    problems: int
    samples: int
    pass_at: dict[int, Estimate]
    difference: dict[int, Estimate]
    score: Estimate
    tokens: float
    cut_off: float


def summarize(
    policy: str,
    data: str,
    source: str,
    reward: str,
    responses: Sequence[Sequence[Response]],
    ks: Iterable[int],
    *,
    correct_from: float,
    confidence: float,
    first: dict[int, np.ndarray] | None = None,
) -> tuple[Result, dict[int, np.ndarray]]:
    """Estimates pass@k of one policy on the problems of one source.

    Args:
        policy, data, source, reward: see :class:`Result`.
        responses: the responses to each problem, the same number for each.
        ks: each k of pass@k.
        correct_from: the smallest score of a right response.
        confidence: level of the intervals.
        first: k -> pass@k of each problem for the policy to compare with.

    Returns:
        The result, and k -> pass@k of each problem.
    """
    scores = np.array([[response.score for response in row] for row in responses])
    problems, samples = scores.shape
    solved = (scores >= correct_from).sum(axis=1)
    values = {k: pass_at_k(samples, solved, k) for k in ks}
    every = [response for row in responses for response in row]
    result = Result(
        policy=policy,
        data=data,
        source=source,
        reward=reward,
        problems=problems,
        samples=samples,
        pass_at={k: estimate(v, confidence) for k, v in values.items()},
        difference={k: estimate(v - first[k], confidence) for k, v in values.items()} if first else {},
        score=estimate(scores.mean(axis=1), confidence),
        tokens=float(np.mean([response.tokens for response in every])),
        cut_off=float(np.mean([response.finish == "length" for response in every])),
    )
    return result, values


def as_json(result: Result) -> dict[str, Any]:
    """Returns a result for JSON: ``pass@1`` and so on with value, low and high, fractions of 1."""
    out = asdict(result)
    for name, prefix in (("pass_at", "pass@"), ("difference", "difference of pass@")):
        out |= {f"{prefix}{k}": value for k, value in out.pop(name).items()}
    return out


def format_table(results: Sequence[Result]) -> str:
    """Returns a table for the terminal, in percent."""
    shown = _short([result.policy for result in results])
    header = ["policy", "data", "problems", "samples"]
    ks = sorted({k for result in results for k in result.pass_at})
    compared = any(result.difference for result in results)
    graded = any(abs(result.score.value - result.pass_at[1].value) > 1e-9 for result in results if 1 in result.pass_at)
    header += [f"pass@{k}, %" for k in ks]
    header += [f"vs {shown[results[0].policy]}, pass@{ks[0]}"] if compared else []
    header += ["mean score"] if graded else []
    header += ["tokens", "cut off, %"]
    rows = [header]
    for result in results:
        several = sum(r.policy == result.policy and r.data == result.data for r in results) > 1
        row = [shown[result.policy], f"{result.data} {result.source}" if several else result.data]
        row += [f"{result.problems}", f"{result.samples}"]
        row += [_percent(result.pass_at[k]) for k in ks]
        if compared:
            row.append(_percent(result.difference[ks[0]], "+") if result.difference else "")
        row += [f"{result.score.value:.3f}"] if graded else []
        rows.append([*row, f"{result.tokens:.0f}", f"{100 * result.cut_off:.1f}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _short(names: Iterable[str]) -> dict[str, str]:
    """Returns name -> name without the folders that all names with folders share."""
    names = list(dict.fromkeys(names))
    folders = [name.split("/")[:-1] for name in names if "/" in name]
    common = len(os.path.commonprefix(folders)) if len(folders) > 1 else 0
    return {name: "/".join(name.split("/")[common:]) if "/" in name else name for name in names}


def _percent(value: Estimate, sign: str = "") -> str:
    if value.low is None or value.high is None:
        return f"{100 * value.value:{sign}.1f}"
    return f"{100 * value.value:{sign}.1f} [{100 * value.low:{sign}.1f}, {100 * value.high:{sign}.1f}]"
