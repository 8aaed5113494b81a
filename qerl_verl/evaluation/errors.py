"""Defines the error of evaluations."""

from __future__ import annotations


class EvaluationError(ValueError):
    """An evaluation cannot be made as requested.

    Attributes:
        problems: the problems with their fixes, one sentence each.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("; ".join(self.problems))
