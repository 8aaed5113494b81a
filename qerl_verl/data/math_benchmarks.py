"""Writes MATH-500, AIME 2024 and 2025 and AMC 2023 for verl's validation:
``python -m qerl_verl.data.math_benchmarks --out DIR``.

:mod:`qerl_verl.data.math_score` scores the answers. Each set is a data source of its own, so verl
reports the sets one by one.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qerl_verl.data.math_score import INSTRUCTION
from qerl_verl.data.prompts import prompt_row
from qerl_verl.data.sources import convert, read_hub, read_jsonl, text_of

BENCHMARKS = {
    "math500": ("HuggingFaceH4/MATH-500", "test"),
    "aime24": ("HuggingFaceH4/aime_2024", "train"),
    "aime25": ("math-ai/aime25", "test"),
    "amc23": ("math-ai/amc23", "test"),
}
"""Name -> data set on the hub and split."""

PROBLEM, ANSWER = ("problem", "question"), ("answer",)
_WHOLE_NUMBER = re.compile(r"0*(\d+)(?:\.0+)?")


def plain(answer: str) -> str:
    """Returns a whole number as a model writes it.

    AIME and AMC have ``033`` and ``27.0``, which become ``33`` and ``27``.
    """
    found = _WHOLE_NUMBER.fullmatch(answer)
    return found.group(1) if found else answer


def rows(examples: Iterable[tuple[str, Any]], name: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of verl's parquet.

    Args:
        examples: pairs of a place to name in errors and the example at that place.
        name: name of the benchmark.

    Raises:
        ValueError: an example lacks a problem or an answer.
    """
    for index, (place, example) in enumerate(examples):
        problem, answer = text_of(example, PROBLEM, place), plain(text_of(example, ANSWER, place))
        yield prompt_row(name, f"{problem}\n\n{INSTRUCTION}", answer, split="test", index=index)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qerl_verl.data.math_benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for NAME.parquet")
    parser.add_argument("--local-dir", type=Path, help="folder with NAME.jsonl; without it they come from the hub")
    arguments = parser.parse_args(argv)
    for name, (dataset, split) in BENCHMARKS.items():
        file = arguments.local_dir and arguments.local_dir / f"{name}.jsonl"
        examples = read_jsonl(file) if file else read_hub(dataset, None, split)
        if convert(rows(examples, name), arguments.out / f"{name}.parquet") is None:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
