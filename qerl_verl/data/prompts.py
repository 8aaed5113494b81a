"""The parquet files of prompts that verl's RLHFDataset reads (verl/utils/dataset/rl_dataset.py)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def user_turn(text: str) -> list[dict[str, str]]:
    """A chat of one user turn."""
    return [{"role": "user", "content": text}]


def prompt_row(data_source: str, question: str, ground_truth: str, **extra_info: Any) -> dict[str, Any]:
    """One prompt with the answer that a rule compares with.

    Args:
        data_source: what verl chooses a reward function by, and names validation metrics after.
        question: the user's turn.
        ground_truth: given to the reward function as it is.
        extra_info: also given to the reward function. verl reads ``index`` from it.
    """
    return {
        "data_source": data_source,
        "prompt": user_turn(question),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """Write the rows, return their number."""
    import pandas

    frame = pandas.DataFrame(list(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.to_parquet(path)
    return len(frame)
