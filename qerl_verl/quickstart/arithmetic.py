"""Defines the task of the quickstart: sums and differences of two small numbers, ``12+9=`` ->
``21``.

The module has the problems, the rows that verl reads and the reward. It does not import torch,
because verl's reward workers load :func:`compute_score` from here
(``reward.custom_reward_function.path``).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from qerl_verl.data.prompts import prompt_row

DATA_SOURCE = "qerl/arithmetic"
LARGEST_OPERAND = 19


@dataclass(frozen=True)
class Problem:
    """``a + b``, or ``a - b`` with ``a >= b``, so that an answer has no sign."""

    a: int
    op: str
    b: int

    @property
    def question(self) -> str:
        return f"{self.a}{self.op}{self.b}="

    @property
    def result(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    @property
    def answer(self) -> str:
        return str(self.result)

    def slips(self) -> list[str]:
        """Returns the answers of careless arithmetic: one or ten too many or too few."""
        return [str(self.result + error) for error in (-10, -1, 1, 10) if self.result + error >= 0]


def all_problems() -> list[Problem]:
    """Returns every problem, in a fixed order."""
    operands = range(LARGEST_OPERAND + 1)
    sums = [Problem(a, "+", b) for a in operands for b in operands]
    return sums + [Problem(a, "-", b) for a in operands for b in operands if a >= b]


def split(seed: int, held_out: int = 128) -> tuple[list[Problem], list[Problem]]:
    """Returns training and validation problems.

    The latter are never trained on, neither in the supervised start nor by reward.
    """
    problems = all_problems()
    random.Random(seed).shuffle(problems)
    return problems[held_out:], problems[:held_out]


def rows(problems: list[Problem]) -> list[dict[str, Any]]:
    """Returns the rows of verl's parquet."""
    return [prompt_row(DATA_SOURCE, p.question, p.answer, index=index) for index, p in enumerate(problems)]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs
) -> float:
    """Returns 1.0 for exactly the right number, otherwise 0.0.

    The signature is that of verl/utils/reward_score/__init__.py.
    """
    return float(solution_str.strip() == ground_truth)
