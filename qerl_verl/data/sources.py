"""Reads examples from a file of JSON lines, or from a data set on the Hugging Face hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qerl_verl.data.prompts import write_parquet


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields place (``file:line``) and content of each line that is not blank.

    Raises:
        ValueError: a line is not JSON.
        OSError: the file cannot be read.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON: {error}") from None


def read_hub(name: str, configuration: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """Yields place (``name/split[row]``) and content of each row of a data set on the hub.

    Args:
        name: name of the data set.
        configuration: configuration of the data set, None for its only one.
        split: split of that configuration.
    """
    from datasets import load_dataset

    for number, example in enumerate(load_dataset(name, configuration, split=split)):
        yield f"{name}/{split}[{number}]", example


def text_of(example: Any, keys: tuple[str, ...], place: str) -> str:
    """Returns the value of the first of ``keys`` that an example has, as stripped text.

    Raises:
        ValueError: the example is not an object, has none of the keys, or the text is empty; names
            ``place``.
    """
    if not isinstance(example, dict):
        raise ValueError(f"{place}: expected an object, got {type(example).__name__}")
    key = next((key for key in keys if example.get(key) is not None), None)
    if key is None:
        raise ValueError(f"{place}: it has none of {', '.join(f'`{key}`' for key in keys)}")
    text = str(example[key]).strip()
    if not text:
        raise ValueError(f"{place}: `{key}` is empty")
    return text


def convert(rows: Iterable[dict[str, Any]], file: Path) -> int | None:
    """Writes a parquet of prompts, prints and returns their number.

    Where a row or a file is bad, it prints the reason to stderr and returns None.
    """
    try:
        count = write_parquet(rows, file)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    print(f"{file}: {count} problems")
    return count
