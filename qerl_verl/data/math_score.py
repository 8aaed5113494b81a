"""Scores mathematics with an answer in ``\\boxed{}``, for ``reward.custom_reward_function.path``.

verl chooses its reward functions by the name of the data source, and has none for BigMath and AMC.
"""

from __future__ import annotations

from typing import Any

INSTRUCTION = "Work through the problem step by step. Put the final answer in \\boxed{}."
"""Text below each problem."""


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> float:
    """Returns 1 if the last ``\\boxed{}`` of a response is the answer, otherwise 0.

    verl normalizes and compares the LaTeX texts (verl/utils/reward_score/math_reward.py). An equal
    value in another form counts only where that normalization makes the two texts equal.
    """
    from verl.utils.reward_score import math_reward

    return float(math_reward.compute_score(solution_str, ground_truth))


def can_be_boxed(answer: str) -> bool:
    """Returns whether the braces of an answer are balanced.

    Otherwise no ``\\boxed{}`` can be read back, so no response would score.
    """
    depth = 0
    for character in answer:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0
