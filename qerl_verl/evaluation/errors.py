"""The one exception of evaluations."""

from __future__ import annotations


class EvaluationError(ValueError):
    """An evaluation that cannot be made as it was asked for.

    Attributes:
        problems: what is wrong and how to mend it, one sentence each.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("; ".join(self.problems))
