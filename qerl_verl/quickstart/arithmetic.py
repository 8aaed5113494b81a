"""The task of the quickstart: sums and differences of two small numbers, ``12+9=`` -> ``21``.

The problems, the files that verl reads and the reward. It imports no torch: verl's reward workers load
:func:`compute_score` from here (``reward.custom_reward_function.path: pkg://qerl_verl.quickstart.arithmetic``).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATA_SOURCE = "qerl/arithmetic"
LARGEST_OPERAND = 29
HELD_OUT_FRACTION = 0.2


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
    def answer(self) -> str:
        return str(self.a + self.b if self.op == "+" else self.a - self.b)
