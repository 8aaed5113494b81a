"""Tests that the summary and tables of docs/performance.md are what the result files say."""

import json
from pathlib import Path

import pytest
import report
from summary import ROWS, Row

RESULTS = Path(report.__file__).parent / "results"


def test_the_page_is_what_the_report_makes_of_the_results():
    """Otherwise: python benchmarks/report.py benchmarks/results."""
    page = report.PAGE.read_text()
    assert report.replaced(page, report.SUMMARY, report.summary(RESULTS)) == page
    assert report.replaced(page, report.TABLES, report.tables(RESULTS)) == page


def test_a_page_without_a_mark_is_refused():
    assert (
        report.replaced("a <!-- x --> b <!-- end of x --> c", "x", "new")
        == "a <!-- x -->\n\nnew\n\n<!-- end of x --> c"
    )
    with pytest.raises(ValueError, match="has no <!-- x -->"):
        report.replaced("a <!-- x --> b", "x", "new")


def test_the_figures_are_drawn_from_the_files_that_are_there(tmp_path, monkeypatch):
    """One figure of two has results here, and one panel of it has none."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    for stem in ("grpo_step_7b", "rollout_7b"):
        (tmp_path / f"{stem}_h200.json").write_text((RESULTS / f"{stem}_h200.json").read_text())
    drawn = report.plot(report.Results(tmp_path, "NVIDIA H200"))
    assert [path.name for path in drawn] == ["performance.png"] and drawn[0].stat().st_size > 10_000


def test_a_comparison_without_a_file_says_so():
    files = {stem: report.load_all(RESULTS, stem) for stem in ROWS}
    text = report.summary_section(RESULTS)
    for stem, comparison in ROWS.items():
        assert (f"| {comparison.what} | {comparison.baseline} | - | not measured | - |" in text) == (not files[stem])
        assert all(comparison.rows(data) for data in files[stem])


CELLS = {
    "met": (Row("", "", [1.5, 2.0], [1.5, 2.31]), "1.5 / 2x", "1.50 / 2.31x"),
    "missed": (Row("", "", [1.5, 2.0], [1.494, 2.31]), "1.5 / 2x", "**1.49** / 2.31x"),
    "met as printed": (Row("", "", [1.5], [1.496]), "1.5x", "1.50x"),
    "at most": (Row("", "", [0.5], [0.52], at_most=True), "at most 0.5x", "**0.52**x"),
    "at most, met": (Row("", "", [0.5], [0.48], at_most=True), "at most 0.5x", "0.48x"),
    "no target": (Row("", "", [None], [3.0], unit=" %"), "-", "3.00 %"),
}


@pytest.mark.parametrize(("row", "target", "measured"), CELLS.values(), ids=CELLS.keys())
def test_a_value_that_misses_its_target_is_bold(row, target, measured):
    assert row.cells()[2:] == [target, measured]


def write(folder, name, gpu, ratios):
    gemm = [
        {"shape": "7B qkv", "n": 1, "k": 1, "m": int(m), "ratio": r, "us": 1.0, "cublas_us": r}
        for m, r in ratios.items()
    ]
    means = {m: {"ratio": r, "max_error": 1e-3} for m, r in ratios.items()}
    content = {"environment": {"gpu": gpu}, "gemm": gemm, "geomean_by_tokens": means}
    (folder / name).write_text(json.dumps(content))


def test_each_gpu_has_its_rows_and_tables(tmp_path):
    """The smallest value of a range counts: for 1 to 16 tokens 2.1, which misses 2.2."""
    write(tmp_path, "gemm_h100.json", "NVIDIA H100", {"1": 2.4, "16": 2.1, "64": 1.7})
    write(tmp_path, "gemm_h200.json", "NVIDIA H200", {"1": 2.5, "64": 1.8})
    write(tmp_path, "gemm_no_pdl_h200.json", "NVIDIA H200", {"1": 2.0})
    text = report.summary(tmp_path) + report.tables(tmp_path)
    what = "| GEMM, shapes of the built-in table, 1 to 16 / 64 tokens | cuBLAS bf16 | 2.2 / 1.6x |"
    assert f"{what} **2.10** / 1.70x | NVIDIA H100 |" in text and f"{what} 2.50 / 1.80x | NVIDIA H200 |" in text
    h100 = text[text.index("### NVIDIA H100") :]
    assert "gemm_h100.json" in h100 and "gemm_no_pdl" not in h100.partition("### NVIDIA H200")[0]
    assert "| quantizing 7B | - | - | not measured | - |" in text


def test_rows_of_an_incomplete_part_are_marked_and_come_after_a_complete_one(tmp_path):
    gpu = "NVIDIA H200"
    write(tmp_path, "gemm_h200.incomplete.json", gpu, {"1": 2.4})
    path = tmp_path / "gemm_h200.incomplete.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"incomplete": "without 7B o"}))
    assert "| 2.2x | 2.40x (incomplete) | NVIDIA H200 |" in report.summary(tmp_path)
    assert "`gemm_h200.incomplete.json`" in report.tables(tmp_path)
    write(tmp_path, "gemm_h200.json", gpu, {"1": 2.3})
    assert "| 2.2x | 2.30x | NVIDIA H200 |" in report.summary(tmp_path)
