"""Writes GSM8K as ``train.parquet`` and ``test.parquet`` for verl:
``python -m qerl_verl.data.gsm8k --out DIR``.

The data source is named ``openai/gsm8k``, by which verl chooses its own reward
(verl/utils/reward_score/gsm8k.py): 1 if the last ``#### <number>`` in the last 300 characters of a
response is the answer, otherwise 0.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qerl_verl.data.prompts import prompt_row
from qerl_verl.data.sources import convert, read_hub, read_jsonl

DATA_SOURCE = "openai/gsm8k"
SPLITS = ("train", "test")
INSTRUCTION = (
    "Work through the problem step by step. Finish with a line that holds only `####`, a space and the number."
)

_FINAL_ANSWER = re.compile(r"####\s*(-?\d[\d,]*(?:\.\d+)?)\s*\Z")


def final_answer(solution: str) -> str | None:
    """Returns the number after ``####`` at the end of a GSM8K solution, or None without one.

    Thousands separators are removed.
    """
    found = _FINAL_ANSWER.search(solution)
    return found.group(1).replace(",", "") if found else None


def rows(examples: Iterable[tuple[str, Any]], split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of verl's parquet.

    Args:
        examples: pairs of a place to name in errors (``file:line``) and the example at that place.
        split: ``train`` or ``test``.

    Raises:
        ValueError: an example is not
            ``{"question": text, "answer": text that ends with #### number}``.
    """
    for index, (place, example) in enumerate(examples):
        if not isinstance(example, dict):
            raise ValueError(f"{place}: expected an object with `question` and `answer`, got {type(example).__name__}")
        for key in ("question", "answer"):
            if not isinstance(example.get(key), str) or not example[key].strip():
                raise ValueError(f"{place}: `{key}` must be a text that is not empty, got {example.get(key)!r}")
        answer = final_answer(example["answer"])
        if answer is None:
            raise ValueError(
                f"{place}: `answer` must end with `#### <number>`, it ends with {example['answer'][-40:]!r}"
            )
        question = f"{example['question'].strip()}\n\n{INSTRUCTION}"
        yield prompt_row(DATA_SOURCE, question, answer, split=split, index=index, solution=example["answer"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qerl_verl.data.gsm8k", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.parquet and test.parquet")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--local-dir", type=Path, help="folder with train.jsonl and test.jsonl")
    source.add_argument("--hub", default=DATA_SOURCE, help="data set on the Hugging Face hub (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for split in SPLITS:
        file = arguments.local_dir and arguments.local_dir / f"{split}.jsonl"
        examples = read_jsonl(file) if file else read_hub(arguments.hub, "main", split)
        if convert(rows(examples, split), arguments.out / f"{split}.parquet") is None:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
