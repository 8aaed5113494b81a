"""Reads text for quantizers that use activations: prompts, and answers if present, as token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_verl.nvfp4.errors import CheckpointError

SAMPLES = 128
"""Number of sequences to calibrate with."""

SAMPLE_TOKENS = 512
"""Largest number of tokens of a sequence; longer ones are truncated."""

HELD_OUT = 8
"""Number of sequences that are set aside to measure the loss on."""

_ANSWERS = ("answer", "solution", "response", "completion", "output")
_PROMPTS = ("question", "instruction", "problem", "query", "input")


@dataclass(frozen=True)
class Calibration:
    """Sequences of token ids, each with the number of leading tokens that are its prompt.

    That number is 0 where the whole sequence is text.

    Attributes:
        sequences: sequences to calibrate with.
        held_out: sequences to measure the loss on.
        source: the files, for messages.
    """

    sequences: tuple[tuple[tuple[int, ...], int], ...]
    held_out: tuple[tuple[tuple[int, ...], int], ...]
    source: str

    @property
    def key(self) -> str:
        """Hash of the content; the same tokens have the same key, whatever their source."""
        content = json.dumps([self.sequences, self.held_out])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.sequences)

    def describe(self) -> dict[str, Any]:
        """Returns counts and the content's hash, for the report and the manifest."""
        return {
            "sequences": len(self.sequences),
            "tokens": self.tokens,
            "held_out_sequences": len(self.held_out),
            "sha256": self.key,
        }


def read_calibration(
    files: str | Path | Sequence[str | Path],
    model: str | Path,
    *,
    samples: int = SAMPLES,
    sample_tokens: int = SAMPLE_TOKENS,
    prompt_key: str = "prompt",
    chat_template: str | None = None,
) -> Calibration:
    """Reads sequences from data files and tokenizes them with the model's chat template.

    The sequences are spread evenly over the rows of the files.

    Args:
        files: ``.parquet`` (such as verl's data), ``.jsonl``, or text. A row is a chat
            (``messages``), a prompt (``prompt_key``, or ``question`` and the like), or ``text``.
            The answer to a prompt is found as ``answer``, ``solution``, ... in the row or in its
            ``extra_info``. A text file is cut into sequences.
        model: folder with the tokenizer.
        samples: number of sequences to calibrate with. :data:`HELD_OUT` more are set aside. The
            result has fewer where the files hold fewer.
        sample_tokens: see :data:`SAMPLE_TOKENS`.
        prompt_key: verl's ``data.prompt_key``.
        chat_template: replaces the tokenizer's template.

    Raises:
        CheckpointError: a file is missing or unreadable, holds nothing usable, or the model has no
            tokenizer.
    """
    for name, value, least in (("samples", samples, 1), ("sample tokens", sample_tokens, 2)):
        if value < least:
            raise CheckpointError(f"calibration: {name}={value}: at least {least}.")
    paths = [Path(f).expanduser() for f in ([files] if isinstance(files, (str, Path)) else files)]
    source = ", ".join(str(f) for f in paths)
    tokenizer = load_tokenizer(model)
    if chat_template:
        tokenizer.chat_template = chat_template
    sequences: list[tuple[tuple[int, ...], int]] = []
    wanted = samples + HELD_OUT
    per_file = -(-wanted // len(paths))
    for file in paths:
        if not file.is_file():
            raise CheckpointError(f"calibration: there is no file {file}.")
        sequences += _sequences(file, tokenizer, per_file, sample_tokens, prompt_key)
    sequences = [s for s in sequences if len(s[0]) > 1]
    if len(sequences) < 2:
        raise CheckpointError(
            f"calibration: {source} holds {len(sequences)} usable rows, at least 2 are needed. A "
            f"row is a chat (`messages`), a prompt (`{prompt_key}`, "
            f"{', '.join(f'`{name}`' for name in _PROMPTS)}) or `text`."
        )
    held_out = max(1, min(HELD_OUT, len(sequences) // 5))
    every = len(sequences) // held_out
    apart = set(range(every - 1, every * held_out, every))  # spread evenly, like the others
    kept = tuple(s for i, s in enumerate(sequences) if i not in apart)
    return Calibration(kept[:samples], tuple(sequences[i] for i in sorted(apart)), source)


def load_tokenizer(model: str | Path) -> Any:
    """Returns the tokenizer in a model's folder.

    Raises:
        CheckpointError: the folder has no tokenizer, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except Exception as error:  # transformers raises many types for a missing or damaged tokenizer
        raise CheckpointError(f"calibration: {model} has no tokenizer that transformers can load: {error}") from error


def _sequences(
    file: Path, tokenizer: Any, wanted: int, tokens: int, prompt_key: str
) -> list[tuple[tuple[int, ...], int]]:
    try:
        if file.suffix == ".parquet":
            rows = _parquet_rows(file, wanted)
        elif file.suffix in (".jsonl", ".json"):
            rows = _jsonl_rows(file, wanted)
        else:
            ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
            pieces = [tuple(ids[i : i + tokens]) for i in range(0, len(ids), tokens)]
            return [(piece, 0) for piece in _spread(pieces, wanted)]
        return [s for row in rows if (s := encode_row(row, tokenizer, tokens, prompt_key)) is not None]
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise CheckpointError(f"calibration: {file} cannot be read: {error}") from error


def _spread(rows: Sequence[Any], wanted: int) -> list[Any]:
    """Returns ``wanted`` of the rows at equal distances, or all rows if there are fewer."""
    return [rows[i] for i in _spread_indices(len(rows), wanted)]


def _spread_indices(rows: int, wanted: int) -> list[int]:
    return list(range(rows)) if rows <= wanted else [i * rows // wanted for i in range(wanted)]


def _parquet_rows(file: Path, wanted: int) -> Iterator[Mapping[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        indices = iter(_spread_indices(parquet.metadata.num_rows, wanted))
        index, begin = next(indices, None), 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if index is not None and index < begin + rows:
                table = parquet.read_row_group(group)
                while index is not None and index < begin + rows:
                    yield table.slice(index - begin, 1).to_pylist()[0]
                    index = next(indices, None)
            begin += rows


def _jsonl_rows(file: Path, wanted: int) -> Iterator[Mapping[str, Any]]:
    text = file.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [line for line in text.splitlines() if line.strip()]
    for row in _spread(rows, wanted):
        row = json.loads(row) if isinstance(row, str) else row
        if not isinstance(row, Mapping):
            raise ValueError(f"expected objects, got {type(row).__name__}")
        yield row


def encode_row(
    row: Mapping[str, Any], tokenizer: Any, tokens: int, prompt_key: str
) -> tuple[tuple[int, ...], int] | None:
    """Returns the first token ids of a row, and how many of them are its prompt.

    Args:
        row: see :func:`read_calibration`.
        tokenizer: the model's tokenizer.
        tokens: largest number of token ids.
        prompt_key: see :func:`read_calibration`.

    Returns:
        None where the row holds no text. The prompt counts as 0 tokens where no answer follows it.
    """
    if isinstance(row.get("messages"), list):
        chat, answer = list(row["messages"]), None
        if chat and chat[-1].get("role") == "assistant":
            answer = chat.pop()["content"]
    else:
        prompt = next((row[key] for key in (prompt_key, *_PROMPTS) if row.get(key)), None)
        if prompt is None:
            text = row.get("text")
            return (tuple(tokenizer(text)["input_ids"][:tokens]), 0) if isinstance(text, str) and text else None
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        places = (row.get("extra_info"), row)
        found = (place.get(key) for place in places if isinstance(place, Mapping) for key in _ANSWERS)
        answer = next((text for text in found if isinstance(text, str) and text), None)
    prompt_text = _render(tokenizer, chat, generation=True)
    begin = len(tokenizer(prompt_text, add_special_tokens=False)["input_ids"])
    if answer is None:
        return tuple(tokenizer(prompt_text, add_special_tokens=False)["input_ids"][:tokens]), 0
    text = _render(tokenizer, [*chat, {"role": "assistant", "content": answer}], generation=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    return tuple(ids), begin if begin < len(ids) - 1 else 0


def _render(tokenizer: Any, chat: list[Mapping[str, str]], *, generation: bool) -> str:
    if tokenizer.chat_template is None:
        return "\n".join(str(turn["content"]) for turn in chat)
    return tokenizer.apply_chat_template(chat, add_generation_prompt=generation, tokenize=False)
