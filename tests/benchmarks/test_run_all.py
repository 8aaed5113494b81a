"""Tests `make bench` in parts: what is skipped, what is measured again, and how a failed part is
handled."""

import argparse
import importlib
import json
import re
import sys
import time
from pathlib import Path

import pytest
import result_file
import run_all
from run_all import BY_NAME, EXTRA, PARTS, Part
from summary import ROWS

BENCH = """
import json, os, sys, time
sys.path[:0] = os.environ["PATHS"].split(":")
import result_file
result_file.hash_code = lambda: os.environ["CODE"]
result_file.gpu_names = lambda: ["NVIDIA H100 80GB HBM3"]
name, path = sys.argv[1], sys.argv[sys.argv.index("--json") + 1]
open("calls", "a").write(name + "\\n")
if name == "silent":
    sys.exit()
with result_file.ResultFile(path, {"command": f"bench --json {path}", "rows": []}) as result:
    for row in result.steps("abc"):
        if row == "b" and name == "slow" and not os.path.exists("fast"):
            time.sleep(60)
        if row == "b" and name == "failing" and not os.path.exists("fast"):
            result.fail(row, "exit code 2")
        else:
            result.content["rows"].append(row)
sys.exit(result.exit_code or name == "wrong")
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs `run_all.main` on benchmarks that take no GPU; returns the exit code and the parts
    that ran."""
    script = tmp_path / "bench.py"
    script.write_text(BENCH)
    names = ("one", "two", "failing", "silent", "slow", "wrong")
    parts = [Part(n, str(script), (n,), 0.1 if n == "slow" else 1) for n in names]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_all, "PARTS", tuple(parts[:2]))
    monkeypatch.setattr(run_all, "EXTRA", (*parts[2:], Part("pair", str(script), ("pair",), 1, gpus=2)))
    monkeypatch.setattr(run_all, "gpu_names", lambda: ["NVIDIA H100 80GB HBM3"])
    monkeypatch.setenv("PATHS", f"{Path(run_all.__file__).parent}:{run_all.ROOT}")
    code = ["c1"]
    monkeypatch.setattr(result_file, "hash_code", lambda: code[0])

    def call(*arguments, changed=None):
        code[0] = changed or code[0]
        monkeypatch.setenv("CODE", code[0])
        (tmp_path / "calls").write_text("")
        exit_code = run_all.main([*arguments, "--results", str(tmp_path / "results")])
        return exit_code, (tmp_path / "calls").read_text().split()

    return call


def test_a_part_that_is_there_is_skipped_until_the_code_changes_or_it_is_forced(bench, tmp_path, capsys):
    both = ("--parts", "one", "two")
    assert bench("--parts", "one") == (0, ["one"])
    assert bench(*both) == (0, ["two"])
    assert bench(*both) == (0, [])
    assert bench(*both, "--force") == (0, ["one", "two"])
    assert bench(*both, changed="c2") == (0, ["one", "two"])
    capsys.readouterr()
    assert bench(*both, "--list") == (0, [])
    assert re.search(r"one +is there: .*one_h100.json", capsys.readouterr().out)


def test_a_result_says_what_it_was_measured_with(bench, tmp_path):
    bench("--parts", "one")
    found = json.loads((tmp_path / "results" / "one_h100.json").read_text())
    assert found["rows"] == ["a", "b", "c"] and found["command"].endswith("one --json one_h100.json")
    made = found["made"]
    assert made["gpu"] == "NVIDIA H100 80GB HBM3" and made["code"] == "c1" and made["seconds"] >= 0
    assert "torch" in made["versions"]
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["one_h100.json"]


PROBLEMS = {
    "failing": (r"incomplete, without b \(exit code 1\); its rows are in .*failing_h100.incomplete.json", ["a", "c"]),
    "silent": (r"no result \(exit code 0\)", None),
    "slow": (r"incomplete, without b, c \(took longer than 0.1 min and was ended\)", ["a"]),
}


@pytest.mark.parametrize(("name", "message", "rows"), [(k, *v) for k, v in PROBLEMS.items()], ids=PROBLEMS.keys())
def test_a_part_without_a_result_keeps_its_rows_and_the_others_run(bench, tmp_path, capsys, name, message, rows):
    started, folder = time.monotonic(), tmp_path / "results"
    assert bench("--parts", name, "one") == (1, [name, "one"])
    assert time.monotonic() - started < 45
    assert re.search(f"{name}: {message}", capsys.readouterr().err)
    left = folder / f"{name}_h100.incomplete.json"
    assert {p.name for p in folder.iterdir()} == {"one_h100.json", *([left.name] if rows else [])}
    if rows:
        assert json.loads(left.read_text())["rows"] == rows
        assert bench("--parts", name, "--list")[0] == 0
        assert re.search(rf"{name} +at most .* min, goes on, without b", capsys.readouterr().out)
        (tmp_path / "fast").touch()
        assert bench("--parts", name, "one") == (0, [name])  # goes on, and is complete then
        assert sorted(json.loads((folder / f"{name}_h100.json").read_text())["rows"]) == ["a", "b", "c"]
        assert not left.exists()


def test_rows_of_other_code_are_not_taken_up(bench, tmp_path):
    assert bench("--parts", "failing")[0] == 1
    assert bench("--parts", "silent", changed="c2")[0] == 1
    (tmp_path / "fast").touch()
    assert bench("--parts", "failing")[0] == 0
    assert json.loads((tmp_path / "results" / "failing_h100.json").read_text())["rows"] == ["a", "b", "c"]


def test_an_old_result_stays_until_a_new_one_is_complete(bench, tmp_path):
    (tmp_path / "fast").touch()
    assert bench("--parts", "failing")[0] == 0
    (tmp_path / "fast").unlink()
    assert bench("--parts", "failing", changed="c2")[0] == 1
    assert json.loads((tmp_path / "results" / "failing_h100.json").read_text())["made"]["code"] == "c1"


def test_a_complete_result_of_a_failed_check_is_kept_and_reported(bench, tmp_path, capsys):
    assert bench("--parts", "wrong")[0] == 1
    assert "wrong: exit code 1" in capsys.readouterr().err
    assert (tmp_path / "results" / "wrong_h100.json").exists()


def test_all_parts_end_after_the_minutes_of_within(bench, tmp_path, capsys):
    (tmp_path / "fast").touch()
    assert bench("--parts", "one", "two", "--within", "0.00001") == (1, [])
    assert "two: not started: the 1e-05 min of --within are over" in capsys.readouterr().err
    assert bench("--parts", "one", "two", "--within", "1") == (0, ["one", "two"])


def test_a_part_for_more_gpus_than_there_are_is_left_out(bench, capsys):
    assert bench("--parts", "pair", "one") == (0, ["one"])
    assert "pair is left out: it needs 2 GPUs, and there is 1" in capsys.readouterr().out


def test_without_a_gpu_nothing_runs(bench, monkeypatch, capsys):
    monkeypatch.setattr(run_all, "gpu_names", lambda: [])
    with pytest.raises(SystemExit):
        bench("--parts", "one")
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu", "short"),
    {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-40GB": "a100",
        "NVIDIA L4": "l4",
        "NVIDIA GeForce RTX 4090": "nvidia_geforce_rtx_4090",
    }.items(),
)
def test_a_file_is_named_by_the_gpu(gpu, short):
    assert run_all.short_name(gpu) == short


def test_a_change_of_measured_code_shows_and_one_of_the_docs_does_not(tmp_path):
    for folder in (*result_file.MEASURED_CODE, "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "a.cu").write_text("1")
    first = result_file.hash_code(tmp_path)
    (tmp_path / "docs" / "a.py").write_text("1")
    (tmp_path / "benchmarks" / "report.py").write_text("1")
    assert result_file.hash_code(tmp_path) == first
    (tmp_path / "kernels" / "a.cu").write_text("2")
    assert result_file.hash_code(tmp_path) != first


def test_all_parts_fit_into_an_hour_and_are_reported():
    assert sum(part.minutes for part in PARTS) <= 60
    in_a_table_alone = {"training_7b_12288", "training_32b"}
    assert {part.name for part in (*PARTS, *EXTRA, *BY_NAME)} - in_a_table_alone <= ROWS.keys()


class Parsed(Exception):
    """Ends a benchmark behind its command line."""


@pytest.mark.parametrize("part", (*PARTS, *EXTRA, *BY_NAME), ids=lambda part: part.name)
def test_the_command_line_of_a_part_is_one_of_its_script(part, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(self, *arguments):
        raise Parsed(parse(self, *arguments))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", [part.script, *part.arguments, "--json", "x.json"])
    with pytest.raises(Parsed) as parsed:
        importlib.import_module(Path(part.script).stem).main()
    assert str(parsed.value.args[0].json) == "x.json"
