"""Stores responses in a JSONL file as they arrive; a later call reads them and continues."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qerl_verl.evaluation.errors import EvaluationError

SETTINGS = "settings"
"""Key of the lines that hold settings; the other lines are responses."""

_BEGINNING = b'{"settings": {'
"""First bytes of every file of responses."""


@dataclass(frozen=True)
class Response:
    """One line of the file.

    Attributes:
        policy: name of the adapter, or of the model without one.
        data: name of the data set.
        index: index of the problem's row in the data set.
        sample: 0 to N - 1.
        seed: seed of its sampling.
        score: see :class:`~qerl_verl.evaluation.rewards.Score`.
        tokens: number of tokens of the response, with its end token.
        finish: vLLM's reason: ``stop``, or ``length`` where the response was cut off.
        text: the response without special tokens.
        details: what the reward function returned beside the score.
    """

    policy: str
    data: str
    index: int
    sample: int
    seed: int
    score: float
    tokens: int
    finish: str
    text: str
    details: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.policy, self.data, self.index, self.sample


class ResponseFile:
    """Opens a file of responses for appending, and creates it if it is missing.

    A last line without an end, which a killed process leaves, is removed. A file that does not
    begin as a file of responses is refused and stays as it is. The file is locked while it is open,
    where the file system has locks.

    Args:
        path: the file.
        settings: name -> JSON value of everything that decides what a response is. The file keeps
            the settings. A later call may add settings that the file lacks, for example another
            adapter; a changed value is refused.

    Attributes:
        done: key -> response, for those in the file.

    Raises:
        EvaluationError: the file is another one, a setting has changed, a line is not a response,
            or another process writes the file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.done: dict[tuple[str, str, int, int], Response] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._lock()
            known = self._read()
            settings = json.loads(json.dumps(settings))
            changed = [
                f"{name} was {known[name]} and is {value}"
                for name, value in settings.items()
                if name in known and known[name] != value
            ]
            if changed:
                raise EvaluationError(
                    f"{path} holds responses of another evaluation: {'; '.join(changed)}. Call it "
                    "as before, or name another file with --responses"
                )
            if new := {name: value for name, value in settings.items() if name not in known}:
                self._append({SETTINGS: new})
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise EvaluationError(
                    f"{self.path}: another process writes it; wait for that one, or name another file with --responses"
                ) from error

    def _read(self) -> dict[str, Any]:
        """Fills :attr:`done`, removes an unfinished last line, and returns the settings."""
        self._file.seek(0)
        content = self._file.read()
        if content[: len(_BEGINNING)] != _BEGINNING[: len(content)]:
            raise EvaluationError(
                f"{self.path} is no file of responses, and was not changed. Name another file with --responses"
            )
        whole = content.rpartition(b"\n")[0]
        known: dict[str, Any] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                if SETTINGS in record:
                    known |= record[SETTINGS]
                else:
                    response = Response(**record)
                    self.done[response.key] = response
            except (ValueError, TypeError) as error:
                raise EvaluationError(
                    f"{self.path}:{number}: no response ({error}). Name another file with --responses"
                ) from error
        if not content.endswith(b"\n"):
            self._file.truncate(len(whole) + 1 if whole else 0)
        return known

    def add(self, response: Response) -> None:
        """Writes a response so that it survives a kill of the process."""
        self._append(asdict(response))
        self.done[response.key] = response

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, default=str).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Writes everything to disk and releases the file."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> ResponseFile:
        return self

    def __exit__(self, *error) -> None:
        self.close()
