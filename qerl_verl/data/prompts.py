"""Writes the parquet files that verl's RLHFDataset reads (verl/utils/dataset/rl_dataset.py)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def user_turn(text: str) -> list[dict[str, str]]:
    """Returns a chat of one user turn."""
    return [{"role": "user", "content": text}]


def prompt_row(data_source: str, question: str, ground_truth: str, **extra_info: Any) -> dict[str, Any]:
    """Returns one prompt, with the answer that a rule compares with.

    Args:
        data_source: name by which verl chooses a reward function and labels validation metrics.
        question: the user's turn.
        ground_truth: passed to the reward function as it is.
        extra_info: also passed to the reward function. verl reads ``index`` from it.
    """
    return {
        "data_source": data_source,
        "prompt": user_turn(question),
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": extra_info,
    }


def write_parquet(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """Writes the rows and returns their number.

    A kill leaves the previous file, or none.

    Raises:
        FileExistsError: the file exists and holds other data than rows of the same data sources.
    """
    import pandas

    frame = pandas.DataFrame(list(rows))
    if path.exists() and not _holds(path, set(frame.get("data_source", ()))):
        raise FileExistsError(
            f"{path} exists and holds other data; choose another folder, or move the file away if it is not needed"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        frame.to_parquet(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return len(frame)


def _holds(path: Path, sources: set[str]) -> bool:
    """Returns whether a file is a parquet of prompts of these data sources."""
    import pandas

    try:
        columns = pandas.read_parquet(path, columns=["data_source", "prompt", "reward_model"])
    except Exception:  # the reader raises many types for a file that is not such a parquet
        return False
    return set(columns["data_source"]) == sources
