"""Runs as verl leaves them, without running anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from qerl_verl.compare.runs import SCORE


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """Writes ``NAME/metrics.jsonl``: ``make_run(name, {metric: values from step 1}, settings)``.

    A single number holds for as many steps as the longest series has, or for ``steps``.
    ``settings`` are dotted keys of the record; None writes no record.
    """

    def make(name: str, metrics: Mapping | float = 0.5, settings: dict | None = None, steps: int = 20) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        metrics = metrics if isinstance(metrics, Mapping) else {SCORE: metrics}
        longest = max((len(v) for v in metrics.values() if isinstance(v, list)), default=steps)
        series = {k: v if isinstance(v, list) else [v] * longest for k, v in metrics.items()}
        with open(folder / "metrics.jsonl", "w") as file:
            for index in range(longest):
                data = {key: values[index] for key, values in series.items() if index < len(values)}
                file.write(json.dumps({"step": index + 1, "data": data}) + "\n")
        if settings is not None:
            (folder / "metrics.settings.json").write_text(json.dumps({"settings": settings}))
        return folder

    return make
