"""Tests that a JSON file is written whole or not at all."""

import json
from pathlib import Path

import pytest

from qerl_verl.json_files import write_json_atomically


@pytest.mark.parametrize("sync", [False, True])
def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path, sync):
    file = tmp_path / "a.json"
    for content in ({"a": 1}, {"b": [2]}):
        write_json_atomically(file, content, sync=sync)
        assert json.loads(file.read_text()) == content and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("fault", ["content", "rename"])
def test_after_an_error_the_old_file_is_as_it_was(tmp_path, monkeypatch, fault):
    file = tmp_path / "a.json"
    write_json_atomically(file, {"a": 1})
    if fault == "rename":
        monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError if fault == "rename" else TypeError):
        write_json_atomically(file, {"a": {2}} if fault == "content" else {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [file]


def test_other_objects_are_written_as_the_caller_says(tmp_path):
    write_json_atomically(tmp_path / "a.json", {"path": Path("b")}, default=str)
    assert json.loads((tmp_path / "a.json").read_text()) == {"path": "b"}
