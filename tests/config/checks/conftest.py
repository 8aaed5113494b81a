"""A folder with data files, and verl's configuration on them."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def files(tmp_path, monkeypatch, write_prompts):
    """Returns a folder with data, which is the working directory."""
    long = [{"role": "user", "content": "1 + " * 60}]
    for name, count, columns in (
        ("32.parquet", 32, {}),
        ("0.parquet", 0, {}),
        ("bare.parquet", 32, {"prompt": None, "question": ["?"] * 32}),
        ("no_reward.parquet", 32, {"reward_model": None}),
        ("text.parquet", 8, {"prompt": [long] * 7 + [[{"role": "user", "content": "1"}]]}),
        ("part/a.parquet", 16, {}),
        ("part/b.parquet", 16, {}),
    ):
        write_prompts(tmp_path / name, count, **columns)
    (tmp_path / "broken.parquet").write_text("nothing")
    (tmp_path / "32.csv").write_text("a,b\n")
    (tmp_path / "4.jsonl").write_text('{"prompt": 1}\n' * 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


BASE = {
    "data.train_files": "32.parquet",
    "data.val_files": "32.parquet",
    "data.train_batch_size": 8,
}


@pytest.fixture(scope="session")
def configured(composed):
    """Returns ``configured(settings)``: a run of eight prompts a step on 32 rows, with settings of
    the case."""

    def configure(settings):
        return composed(*(f"{key}={json.dumps(value)}" for key, value in {**BASE, **settings}.items()))

    return configure
