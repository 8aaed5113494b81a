"""Tests `make bench` in parts: what is skipped, what is measured again, and how a failed part is
handled."""

import json
import re
import time
from pathlib import Path

import pytest
import run_all
from run_all import EXTRA, PARTS, Part
from summary import ROWS

BENCH = """
import json, pathlib, sys, time
name, path = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
open("calls", "a").write(name + "\\n")
if name == "slow":
    time.sleep(60)
if name != "silent":
    path.write_text(json.dumps({"command": f"bench --json {path}", "value": 1}))
sys.exit(name == "failing")
"""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs `run_all.main` on benchmarks that take no GPU; returns the exit code and the parts
    that ran."""
    script = tmp_path / "bench.py"
    script.write_text(BENCH)
    names = ("one", "two", "failing", "silent", "slow")
    parts = [Part(n, str(script), (n,), 0.02 if n == "slow" else 1) for n in names]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_all, "PARTS", tuple(parts[:2]))
    monkeypatch.setattr(run_all, "EXTRA", (*parts[2:], Part("pair", str(script), ("pair",), 1, gpus=2)))
    monkeypatch.setattr(run_all, "gpu_names", lambda: ["NVIDIA H100 80GB HBM3"])
    code = ["c1"]
    monkeypatch.setattr(run_all, "hash_code", lambda: code[0])

    def call(*arguments, changed=None):
        code[0] = changed or code[0]
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
    assert found["value"] == 1 and found["command"].endswith("one --json one_h100.json")
    made = found["made"]
    assert made["gpu"] == "NVIDIA H100 80GB HBM3" and made["code"] == "c1" and made["seconds"] >= 0
    assert "torch" in made["versions"]
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["one_h100.json"]


PROBLEMS = {
    "failing": r"ended with exit code 1; what it measured is in .*\.failing_h100\.json\.part",
    "silent": r"wrote no result \(exit code 0\)",
    "slow": r"took longer than 0.02 min and was ended",
}


@pytest.mark.parametrize(("name", "message"), PROBLEMS.items())
def test_a_part_without_a_result_does_not_keep_the_others_from_running(bench, tmp_path, capsys, name, message):
    started = time.monotonic()
    assert bench("--parts", name, "one") == (1, [name, "one"])
    assert time.monotonic() - started < 30
    assert re.search(f"no result: {name} {message}", capsys.readouterr().err)
    assert [p.name for p in (tmp_path / "results").glob("[!.]*")] == ["one_h100.json"]
    assert bench("--parts", name, "one")[1] == [name]  # taken up again


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
    for folder in (*run_all.MEASURED_CODE, "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "kernels" / "a.cu").write_text("1")
    first = run_all.hash_code(tmp_path)
    (tmp_path / "docs" / "a.py").write_text("1")
    (tmp_path / "benchmarks" / "report.py").write_text("1")
    assert run_all.hash_code(tmp_path) == first
    (tmp_path / "kernels" / "a.cu").write_text("2")
    assert run_all.hash_code(tmp_path) != first


def test_all_parts_fit_into_an_hour_exist_and_are_reported():
    assert sum(part.minutes for part in PARTS) <= 60
    folder = Path(run_all.__file__).parent
    for part in (*PARTS, *EXTRA):
        text = (folder / part.script).read_text()
        options = [a for a in part.arguments if a.startswith("--")]
        assert all(f'"{option}"' in text for option in (*options, "--json"))
    known = {part.name for part in (*PARTS, *EXTRA)}
    assert known - {"training_7b_12288"} <= ROWS.keys()
