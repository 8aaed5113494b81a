"""Writes BigMath by levels of difficulty for verl: ``python -m qerl_verl.data.bigmath --out DIR``.

The levels are those of ``open-r1/Big-Math-RL-Verified-Processed``. Its configurations
``level_3_4_5`` and ``level_4_5`` are the paper's training sets (arXiv 2510.11696, appendix E) for
7B and 14B, and for 32B. :mod:`qerl_verl.data.math_score` scores the answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qerl_verl.data.math_score import INSTRUCTION, can_be_boxed
from qerl_verl.data.prompts import prompt_row
from qerl_verl.data.sources import convert, read_hub, read_jsonl, text_of

DATA_SOURCE = "bigmath"
HUB = "open-r1/Big-Math-RL-Verified-Processed"
LEVELS = ("level_3_4_5", "level_4_5")
PROBLEM, ANSWER = ("prompt", "problem", "question"), ("solution", "answer")


class Rows:
    """Yields the rows of verl's parquet, and counts the examples that are left out.

    Args:
        examples: pairs of a place to name in errors and the example at that place.
        level: the name of the training set.

    Attributes:
        left_out: number of examples whose answer cannot be boxed, see
            :func:`~qerl_verl.data.math_score.can_be_boxed`.
    """

    def __init__(self, examples: Iterable[tuple[str, Any]], level: str):
        self._examples, self._level = examples, level
        self.left_out = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the rows.

        Raises:
            ValueError: an example lacks a problem or an answer.
        """
        for index, (place, example) in enumerate(self._examples):
            problem, answer = text_of(example, PROBLEM, place), text_of(example, ANSWER, place)
            if not can_be_boxed(answer):
                self.left_out += 1
                continue
            yield prompt_row(DATA_SOURCE, f"{problem}\n\n{INSTRUCTION}", answer, split=self._level, index=index)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qerl_verl.data.bigmath", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for LEVEL.parquet")
    parser.add_argument("--level", choices=LEVELS, action="append", help="a training set (default: all)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--local-dir", type=Path, help="folder with LEVEL.jsonl")
    source.add_argument("--hub", default=HUB, help="data set on the Hugging Face hub (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for level in arguments.level or LEVELS:
        file = arguments.local_dir and arguments.local_dir / f"{level}.jsonl"
        rows = Rows(read_jsonl(file) if file else read_hub(arguments.hub, level, "train"), level)
        if convert(rows, arguments.out / f"{level}.parquet") is None:
            return 1
        if rows.left_out:
            print(f"{level}: {rows.left_out} left out whose answers have unbalanced braces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
