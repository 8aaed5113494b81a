"""Computes the reward of a response as verl does in a run."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qerl_verl.data import bigmath, math_benchmarks, math_score
from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.evaluation.problems import Problem

BOXED = frozenset({*math_benchmarks.BENCHMARKS, bigmath.DATA_SOURCE})
"""Data sources of :mod:`qerl_verl.data` with boxed answers, for which verl has no reward or another
one."""

VERL, OURS = "verl's default_compute_score", "qerl_verl.data.math_score"


@dataclass(frozen=True)
class Score:
    """The score of a response.

    Attributes:
        value: the number that verl's ``val-core`` averages: ``acc`` of the reward function's result
            where it has one, otherwise the reward.
        details: what the reward function returned beside it.
    """

    value: float
    details: dict[str, Any] = field(default_factory=dict)


class Reward:
    """Scores responses.

    Args:
        function: ``FILE[:NAME]``, as ``reward.custom_reward_function.path`` and ``.name`` of verl.
            None chooses by the data source: :func:`qerl_verl.data.math_score.compute_score` for
            those of :mod:`qerl_verl.data` with boxed answers, otherwise verl's
            ``default_compute_score``.

    Attributes:
        digest: name of the function with a hash of its file, or of its path if that is no file.

    Raises:
        EvaluationError: the function cannot be loaded.
    """

    def __init__(self, function: str | None = None):
        self.function = function
        self._custom, self.digest = (None, None) if function is None else _load(function)

    def name(self, source: str) -> str:
        """Returns the name of the function that scores a data source."""
        return self.function or (OURS if source in BOXED else VERL)

    def __call__(self, problem: Problem, response: str) -> Score:
        """Scores a response to a problem.

        The arguments are those of verl's reward managers
        (verl/experimental/reward_loop/reward_manager/naive.py).

        Raises:
            EvaluationError: the function fails, or does not return a finite number.
        """
        function = self._custom or self._by_source(problem.source)
        extra = {**problem.extra_info, "num_turns": 2, "rollout_reward_scores": {}}
        try:
            result = function(
                data_source=problem.source, solution_str=response, ground_truth=problem.answer, extra_info=extra
            )
            if inspect.isawaitable(result):
                result = asyncio.run(_wait(result))
        except NotImplementedError as error:
            raise EvaluationError(
                f"data_source {problem.source}: verl has no reward for it; give one with --reward-function FILE[:NAME]"
            ) from error
        except Exception as error:
            raise EvaluationError(
                f"the reward function {self.name(problem.source)} failed on row {problem.index} of "
                f"{problem.source}: {type(error).__name__}: {error}"
            ) from error
        details = dict(result) if isinstance(result, dict) else {}
        value = details.get("acc", details.get("score")) if details else result
        number = _number(value)
        if number is None:
            raise EvaluationError(
                f"the reward function {self.name(problem.source)} returned {str(result)[:80]} for "
                f"row {problem.index} of {problem.source}; it has to be a finite number, or a "
                "mapping with one as `score`"
            )
        return Score(number, details)

    @staticmethod
    def _by_source(source: str) -> Callable[..., Any]:
        if source in BOXED:
            return math_score.compute_score
        from verl.utils.reward_score import default_compute_score

        return default_compute_score


def _number(value: Any) -> float | None:
    """Returns a finite number (also from NumPy or torch) as float, and None for anything else."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


async def _wait(awaitable: Any) -> Any:
    return await awaitable


def _load(given: str) -> tuple[Callable[..., Any], str]:
    from omegaconf import OmegaConf
    from verl.trainer.ppo.reward import get_custom_reward_fn

    path, _, name = given.rpartition(":")
    if not path or not name.isidentifier():
        path, name = given, "compute_score"
    if "://" not in path:
        path = str(Path(path).expanduser())
    node = {"path": path, "name": name, "reward_kwargs": {}}
    try:
        function = get_custom_reward_fn(OmegaConf.create({"reward": {"custom_reward_function": node}}))
    except Exception as error:  # a missing file or name, or an error that the file raises
        cause = error.__cause__ or error
        raise EvaluationError(
            f"--reward-function {given}: {name} cannot be loaded from {path} "
            f"({type(cause).__name__}: {cause}). Give a Python file with a function "
            "compute_score(data_source, solution_str, ground_truth, extra_info), or FILE:NAME"
        ) from error
    file = Path(path)
    content = file.read_bytes() if file.is_file() else path.encode()
    return function, f"{name} {hashlib.sha256(content).hexdigest()[:16]}"
