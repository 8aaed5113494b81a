"""Tests that a benchmark keeps what it measured, and goes on where an interruption ended it."""

import json
import os
import signal

import pytest
import result_file
from result_file import ResultFile, command_of

ARGV = ["benchmarks/bench_x.py", "--shape", "7B", "--json", "somewhere.json"]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(result_file, "gpu_names", lambda: ["NVIDIA H100 80GB HBM3"])
    monkeypatch.setattr(result_file, "hash_code", lambda: "c1")
    return tmp_path / "x.json"


def measure(path, steps, *, ends_in=None, fails=(), argv=ARGV):
    """Measures steps into a file, and returns those that were measured and the exit code."""
    measured = []
    with ResultFile(path, {"command": "x", "rows": []}, argv) as result:
        for name in result.steps(steps):
            if name == ends_in:
                raise KeyboardInterrupt
            measured.append(name)
            if name in fails:
                result.fail(name, "exit code 1")
            else:
                result.content["rows"].append(name)
    return measured, result.exit_code


def test_an_interrupted_benchmark_keeps_its_rows_and_goes_on(path, capsys):
    with pytest.raises(KeyboardInterrupt):
        measure(path, "abc", ends_in="c")
    found = json.loads(path.read_text())
    assert found["rows"] == found["finished"] == ["a", "b"] and found["incomplete"] == "without c"
    assert found["made"]["gpu"] == "NVIDIA H100 80GB HBM3" and found["made"]["code"] == "c1"
    assert measure(path, "abc") == (["c"], 0)
    assert "from an interrupted call: a, b" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["rows"] == ["a", "b", "c"] and "incomplete" not in found
    assert measure(path, "abc") == (["a", "b", "c"], 0)  # a complete file is measured anew
    assert json.loads(path.read_text())["rows"] == ["a", "b", "c"]


def test_the_file_is_there_after_every_step(path):
    with ResultFile(path, {"rows": []}, ARGV) as result:
        for number, name in enumerate(result.steps("ab")):
            assert path.exists() == (number > 0)
            result.content["rows"].append(name)
        assert json.loads(path.read_text())["incomplete"] == "not at its end"
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_a_failed_step_is_named_and_measured_again(path):
    assert measure(path, "abc", fails="b") == (["a", "b", "c"], 1)
    found = json.loads(path.read_text())
    assert found["rows"] == ["a", "c"] and found["failed"] == {"b": "exit code 1"}
    assert found["incomplete"] == "without b"
    assert measure(path, "abc") == (["b"], 0)
    assert json.loads(path.read_text())["failed"] == {}


def test_a_time_limit_ends_a_benchmark_as_an_exception_does(path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, ResultFile(path, {"rows": []}, ARGV) as result:
        for name in result.steps("ab"):
            if name == "b":
                os.kill(os.getpid(), signal.SIGTERM)
            result.content["rows"].append(name)
    assert ended.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    found = json.loads(path.read_text())
    assert found["rows"] == ["a"] and found["incomplete"] == "without b"


OTHER_CONDITIONS = {
    "other code": lambda patch: patch.setattr(result_file, "hash_code", lambda: "c2"),
    "other card": lambda patch: patch.setattr(result_file, "gpu_names", lambda: ["NVIDIA H200"]),
    "other versions": lambda patch: patch.setattr(result_file, "PACKAGES", ()),
}


@pytest.mark.parametrize("change", OTHER_CONDITIONS.values(), ids=OTHER_CONDITIONS.keys())
def test_rows_of_other_conditions_are_not_taken_up(path, monkeypatch, change):
    with pytest.raises(KeyboardInterrupt):
        measure(path, "ab", ends_in="b")
    change(monkeypatch)
    assert measure(path, "ab") == (["a", "b"], 0)
    assert json.loads(path.read_text())["rows"] == ["a", "b"]


def test_rows_of_other_arguments_are_not_taken_up(path):
    with pytest.raises(KeyboardInterrupt):
        measure(path, "ab", ends_in="b")
    assert measure(path, "ab", argv=[*ARGV, "--layers", "2"])[0] == ["a", "b"]


def test_a_broken_file_is_replaced_and_none_is_needed(path):
    path.write_text("{")
    assert measure(path, "a") == (["a"], 0) and json.loads(path.read_text())["rows"] == ["a"]
    assert measure(None, "a") == (["a"], 0)


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        (["--json", "a.json", "--layers", "2"], ["--layers", "2"]),
        (["--json=a.json", "--layers", "2"], ["--layers", "2"]),
        (["--tokens", "1", "8", "--work", "/tmp/x"], ["--tokens", "1", "8"]),
        (["--model", "/somewhere/SmolLM2"], ["--model", "SmolLM2"]),
    ],
)
def test_folders_are_no_condition(more, kept):
    assert command_of(["/x/bench.py", *more]) == ["bench.py", *kept]
