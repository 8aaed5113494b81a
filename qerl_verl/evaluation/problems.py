"""Reads the data sets of an evaluation: benchmarks by name, and files in the form that verl
reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_verl.data import gsm8k, math_benchmarks
from qerl_verl.data.sources import read_hub, read_jsonl
from qerl_verl.evaluation.errors import EvaluationError

BENCHMARKS = ("gsm8k", *math_benchmarks.BENCHMARKS)
FORMATS = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Problem:
    """A prompt, and the answer that the reward compares with.

    Attributes:
        index: index of its row in the data set.
        source: verl's ``data_source``.
        messages: the chat.
        answer: verl's ``ground_truth``.
        extra_info: verl's ``extra_info``, for the reward.
    """

    index: int
    source: str
    messages: list[dict[str, Any]]
    answer: Any
    extra_info: dict[str, Any]


@dataclass(frozen=True)
class DataSet:
    """The problems of one ``--data``.

    Attributes:
        name: name of the benchmark, or the file as it was given.
        problems: in the order of the file.
        digest: hash of all rows, including those beyond a limit.
    """

    name: str
    problems: tuple[Problem, ...]
    digest: str


def read_data(given: str, limit: int | None = None, prompt_key: str = "prompt") -> DataSet:
    """Reads one ``--data``.

    Args:
        given: a name of :data:`BENCHMARKS` (from the Hugging Face hub); ``NAME=FILE``, the same
            benchmark from a JSONL file with the fields of the original data set; or a parquet,
            JSONL or JSON file with verl's columns ``data_source``, ``prompt`` and ``reward_model``.
        limit: number of problems to take from the beginning; None takes all.
        prompt_key: the column of prompts (verl's ``data.prompt_key``).

    Raises:
        EvaluationError: a file is missing or unreadable, or a row lacks a prompt or an answer.
    """
    where = f"--data {given}"
    name, _, file = given.partition("=")
    is_file = Path(given).expanduser().is_file()
    if not is_file and name in BENCHMARKS:
        rows, key = _benchmark_rows(name, file, where), "prompt"
    else:
        name, key = given, prompt_key
        if not is_file:
            raise EvaluationError(
                f"{where}: there is no such file. Give a parquet or JSONL file with verl's "
                f"columns, a name ({', '.join(BENCHMARKS)}), or NAME=FILE for a benchmark's own "
                "JSONL"
            )
        rows = _file_rows(Path(given).expanduser(), where)
    problems, digest = [], hashlib.sha256()
    for index, (place, row) in enumerate(rows):
        problem = _problem(index, row, key, place)
        problems.append(problem)
        content = [problem.source, problem.messages, problem.answer, problem.extra_info]
        digest.update(json.dumps(content, sort_keys=True, default=str).encode())
    if not problems:
        raise EvaluationError(f"{where}: no problem in it; give a file with rows")
    return DataSet(name, tuple(problems[:limit]), digest.hexdigest()[:16])


def _benchmark_rows(name: str, file: str, where: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a benchmark as its module in :mod:`qerl_verl.data` writes them."""
    hub, configuration, split = (
        (gsm8k.DATA_SOURCE, "main", "test") if name == "gsm8k" else _math_source(math_benchmarks.BENCHMARKS[name])
    )
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            raise EvaluationError(f"{where}: there is no file {file}; give the JSONL file of {hub}")
        examples = read_jsonl(path)
    else:
        examples = _from_hub(hub, configuration, split, name, where)
    made = gsm8k.rows(examples, split) if name == "gsm8k" else math_benchmarks.rows(examples, name)
    try:
        for row in made:
            yield f"{where}, row {row['extra_info']['index']}", row
    except (ValueError, OSError) as error:
        raise EvaluationError(f"{where}: {error}") from error


def _math_source(source: tuple[str, str]) -> tuple[str, None, str]:
    hub, split = source
    return hub, None, split


def _from_hub(
    hub: str, configuration: str | None, split: str, name: str, where: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        yield from read_hub(hub, configuration, split)
    # offline or not found: datasets and huggingface_hub raise many types
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise EvaluationError(
            f"{where}: {hub} cannot be fetched from the Hugging Face hub ({reason}). Give its JSONL file with --data {name}=FILE"
        ) from error


def _file_rows(path: Path, where: str) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file, as verl reads it (verl/utils/dataset/rl_dataset.py)."""
    if path.suffix not in FORMATS:
        raise EvaluationError(f"{where}: verl reads {', '.join(FORMATS)} files")
    try:
        if path.suffix == ".parquet":
            from pyarrow.parquet import read_table

            rows = read_table(path).to_pylist()
        elif path.suffix == ".json" and path.read_text(encoding="utf-8").lstrip().startswith("["):
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            rows = [row for _, row in read_jsonl(path)]
    except Exception as error:  # pyarrow raises a type of its own for each kind of broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EvaluationError(f"{where}: it cannot be read: {reason}") from error
    for index, row in enumerate(rows):
        yield f"{where}, row {index}", row


def _problem(index: int, row: Any, prompt_key: str, place: str) -> Problem:
    """Converts one row.

    Raises:
        EvaluationError: the row lacks a column that verl reads.
    """
    if not isinstance(row, dict):
        raise EvaluationError(f"{place}: expected an object with verl's columns, got {type(row).__name__}")
    messages = row.get(prompt_key)
    if not messages:
        raw = " It has `question` and `answer`: give it with --data gsm8k=FILE, if it is GSM8K's own file"
        raise EvaluationError(
            f"{place}: no column `{prompt_key}`; it has {', '.join(map(str, row))}. Name another one with --prompt-key."
            + (raw if {"question", "answer"} <= row.keys() else "")
        )
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise EvaluationError(f"{place}: `{prompt_key}` must be a list of messages with `role` and `content`")
    if any(row.get(column) for column in ("images", "videos", "audios")):
        raise EvaluationError(f"{place}: it has images, videos or audio; text alone can be evaluated")
    if not isinstance(row.get("data_source"), str):
        raise EvaluationError(f"{place}: no `data_source`, by which verl chooses the reward; add the column")
    reward_model = row.get("reward_model")
    answer = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    if answer is None or answer == "":
        raise EvaluationError(
            f"{place}: no answer: `reward_model` must be an object with a `ground_truth`, got {str(reward_model)[:80]}"
        )
    extra = row.get("extra_info")
    return Problem(index, row["data_source"], messages, answer, dict(extra) if isinstance(extra, dict) else {})
