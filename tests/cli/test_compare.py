"""Tests `qerl compare`: the terminal, the figure, the page and the exit code."""

import json
import re
from html.parser import HTMLParser

import pytest

from qerl_verl.cli.main import main
from qerl_verl.compare.runs import SCORE
from tests.compare.conftest import make_run  # noqa: F401

SETTINGS = {"data.train_batch_size": 8, "qerl.arm": "nvfp4"}


@pytest.fixture
def runs(tmp_path, make_run):  # noqa: F811
    """Returns two arms of two seeds, and one of a single run with another batch size."""
    for arm, reward in (("bf16", 0.3), ("nvfp4", 0.4)):
        for seed in (1, 2):
            metrics = {
                SCORE: [reward + 0.01 * seed + 0.001 * i for i in range(30)],
                "actor/entropy": 1.25,
                "timing_s/step": 3.0,
                "timing_s/gen": 2.0,
                "val-core/openai/gsm8k/acc/mean@1": [0.1] * 3,
            }
            make_run(f"runs/{arm}_s{seed}", metrics, settings=SETTINGS | {"qerl.arm": arm})
    make_run("other", 0.5, settings=SETTINGS | {"data.train_batch_size": 9}, steps=30)
    return tmp_path / "runs"


def test_the_tables_name_arms_values_intervals_and_differences(runs, capsys):
    assert main(["compare", str(runs), "--window", "5"]) == 0
    out = capsys.readouterr().out
    for shown in (
        "bf16 (baseline)",
        "bf16_s1, bf16_s2",
        "critic/score/mean, steps 1 to 30",
        "difference from bf16",
        "last 5 steps",
        "0.442",  # 0.4 + 0.01 * 1.5 + 0.001 * 27
        "[0.437, 0.447]",
        "+0.1 *",
        "steps to 0.342 (bf16's last)",
        "entropy, clean policy",
        "percentile bootstrap over runs, 95%, 5000 resamples, seed 0",
        "seed by seed where two arms share at least two seeds (seeds 1, 2)",
        "grouped by their names without the seed (ARM=GLOB groups by hand): bf16, nvfp4",
        "with fewer than 5 runs a bootstrap interval is too narrow: bf16, nvfp4",
        "qerl.arm",
    ):
        assert shown in out


class Page(HTMLParser):
    """Collects the page's cells and references."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.cells = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe")
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_data(self, data):
        self.cells.append(data.strip())


def test_figure_page_and_json_name_a_difference_that_is_allowed(runs, tmp_path, capsys, monkeypatch):
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text, **kwargs: titles.append(text))
    files = {kind: tmp_path / f"out.{kind}" for kind in ("png", "html", "json")}
    arguments = [
        "compare",
        str(runs),
        f"o<b>={tmp_path / 'other'}",
        "--allow-differences",
        "--title",
        "A <title>",
    ]
    assert main([*arguments, *(a for kind, path in files.items() for a in (f"--{kind}", str(path)))]) == 0
    said = "data.train_batch_size is 8 (bf16_s1, bf16_s2, nvfp4_s1 and 1 more) and 9 (other)"
    assert f"NOT THE SAME: {said}" in capsys.readouterr().out
    assert said in titles[0] and "centred moving average of 5 steps" in titles[0] and "no band: o<b>" in titles[0]
    found = json.loads(files["json"].read_text())
    assert found["conflicts"] == [said] and found["options"]["smooth"] == 5
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    text = files["html"].read_text()
    page = Page(text)
    assert len(page.sources) == 1 and page.sources[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?://|url\(|@import", text.replace(page.sources[0], ""))
    assert {said, "A <title>", "o<b>", "0.4395\n[0.4345, 0.4445]"} <= set(page.cells)


def test_json_on_stdout_is_json_alone(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(runs), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["arms"] and not (tmp_path / "-").exists()


REFUSED = {
    "other batch": (
        ["runs", "other"],
        "the runs cannot be compared:\n  - data.train_batch_size is 8",
    ),
    "nowhere to write": (
        ["runs", "--png", "missing/out.png"],
        "missing/out.png: there is no folder",
    ),
    "no run": (["missing"], "missing: no file or folder matches"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_compared_ends_with_the_reason(runs, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"qerl: {message}")


@pytest.mark.parametrize("option", ["--smooth=4", "--smooth=0", "--window=0", "--confidence=1.5", "--min-steps=-1"])
def test_options_out_of_range_are_refused(runs, capsys, option):
    with pytest.raises(SystemExit) as end:
        main(["compare", str(runs), option])
    assert end.value.code == 2 and option.partition("=")[0] in capsys.readouterr().err


def test_runs_may_stand_after_the_options(runs, tmp_path, capsys):
    assert main(["compare", str(runs / "bf16_s1"), "--smooth", "1", f"four={runs / 'nvfp4_s'}*"]) == 0
    assert "four" in capsys.readouterr().out
