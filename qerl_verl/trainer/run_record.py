"""Writes a run's record beside its metrics, so that ``qerl compare`` knows what it compares.

verl's ``file`` logger writes only metrics, and truncates its file when a run resumes
(verl/utils/tracking.py, FileLogger). So the run's configuration goes to ``<stem>.settings.json``
beside ``<stem>.jsonl``, and metrics that a resumed run would overwrite move to ``<stem>.0.jsonl``.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qerl_verl.compare.runs import RECORD_SUFFIX, SCORE, next_part
from qerl_verl.compare.settings import CONTENT
from qerl_verl.config.keys import flatten
from qerl_verl.json_files import write_json_atomically
from qerl_verl.log_lines import say

HASHED_BYTES = 1 << 30
"""Larger files are not read for their hash."""

_CONTENTS = ("data.train_files", "data.val_files", "reward.custom_reward_function.path")
_PRIVATE = re.compile(r"^ray_kwargs\.|token$|password|secret|api_key", re.IGNORECASE)
"""Keys that may hold credentials stay out of the record."""


def metrics_file(config: DictConfig) -> Path | None:
    """Returns the file to which verl's ``file`` logger writes, None without that logger."""
    backends = OmegaConf.select(config, "trainer.logger") or []
    if "file" not in ([backends] if isinstance(backends, str) else backends):
        return None
    if path := os.getenv("VERL_FILE_LOGGER_PATH"):
        return Path(path)
    root = os.path.expanduser(os.getenv("VERL_FILE_LOGGER_ROOT", "."))
    return Path(root, config.trainer.project_name, f"{config.trainer.experiment_name}.jsonl")


def keep_earlier_metrics(path: Path) -> Path | None:
    """Moves the metrics of the run's earlier start aside before verl truncates the file.

    Returns:
        Their new path; None if there are none.

    Raises:
        OSError: the file cannot be moved.
    """
    try:
        if SCORE not in path.read_text(errors="replace"):
            return None
    except FileNotFoundError:
        return None
    part = next_part(path)
    path.rename(part)
    return part


def describe_run(config: DictConfig) -> dict[str, Any]:
    """Returns dotted keys and values of the configuration, as JSON has them, and under
    ``<key>.sha256`` the SHA-256 of each file that defines data or reward, null if the file is not
    available.
    """
    settings = flatten(OmegaConf.to_container(config, resolve=True))
    settings = {key: value for key, value in settings.items() if not _PRIVATE.search(key)}
    for key in _CONTENTS:
        if (value := settings.get(key)) is not None:
            hashes = [_hash(Path(str(file))) for file in ([value] if isinstance(value, str) else value)]
            settings[f"{key}{CONTENT}"] = None if None in hashes else hashes
    return settings


def _hash(path: Path) -> str | None:
    try:
        if path.stat().st_size > HASHED_BYTES:
            return None
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()
    except OSError:  # on the hub, or in a file system that verl copies from
        return None


def write_record(path: Path, settings: dict[str, Any]) -> None:
    """Writes the record of the run whose metrics are in ``path``.

    Args:
        settings: see :func:`describe_run`.

    Raises:
        OSError: the record cannot be written.
    """
    write_json_atomically(path.with_suffix(RECORD_SUFFIX), {"settings": settings}, default=str)


class RunRecordMixin:
    """Writes the record of one of verl's V1 trainers, and keeps metrics that a resumed run would
    overwrite. A full disk or a folder without permission is reported and does not end the run.
    """

    def __init__(self, config: DictConfig):
        self._settings = describe_run(config)  # verl writes what it derives into the configuration
        super().__init__(config)

    def fit(self, *args, **kwargs):
        path = metrics_file(self.config)
        if path is not None:
            try:
                if getattr(self, "global_steps", 0) > 0 and (part := keep_earlier_metrics(path)):
                    say(f"the metrics of the steps before are in {part} from now on; qerl compare reads both")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_record(path, self._settings)
            except OSError as error:
                say(f"the record of the run beside {path} could not be written: {error}")
        return super().fit(*args, **kwargs)
