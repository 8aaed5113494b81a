"""Tests the table from metrics, and the quickstart's behaviour when verl fails."""

import json
import signal

import pytest

from qerl_verl.quickstart import __main__ as quickstart
from qerl_verl.quickstart.report import DIFFERENCE, ENTROPY, REWARD, SIGMA, STAGE, Run, kernels, plot, summarize, table

VALIDATION = "val-core/qerl/arithmetic/acc/mean@4"
LOG = """
(WorkerDict pid=7) [qerl] kernel: actor NVFP4 linear = A
(VLLM pid=8) [qerl] kernel: rollout NVFP4 linear = B
(WorkerDict pid=9) [qerl] kernel: actor NVFP4 linear = A
"""


def step_metrics(step: int) -> dict:
    stage = (step - 1) // 4
    return {
        REWARD: step / 100,
        ENTROPY: 1 - step / 100,
        SIGMA: [0.0, 0.01, 0.005][stage],
        STAGE: stage,
        DIFFERENCE: stage / 10,
        "timing_s/gen": 2.0,
        "timing_s/step": 3.0 + step % 2,
    }


@pytest.fixture
def metrics(tmp_path):
    """Returns twelve steps in the format of verl's file logger, validation before and after, the
    last line cut off."""
    path = tmp_path / "metrics.jsonl"
    entries = [(0, {VALIDATION: 0.25, VALIDATION.replace("mean", "best"): 0.9})]
    entries += [(step, step_metrics(step)) for step in range(1, 13)]
    entries[-1][1][VALIDATION] = 0.75
    lines = [json.dumps({"step": step, "data": data}) for step, data in entries]
    path.write_text("\n".join(lines) + '\n{"step": 13, "da')
    return path


def test_the_numbers_of_the_summary(metrics):
    summary = summarize(Run.read(metrics), samples_per_step=256, seconds={"model": 30.04}, log=LOG)
    assert summary["steps"] == 12 and summary["steps_per_end"] == 5 and summary["samples_per_end"] == 1280
    assert summary["reward"] == pytest.approx([0.03, 0.10])
    assert summary["entropy"] == pytest.approx([0.97, 0.90])
    assert summary["validation"] == [(0, 0.25), (12, 0.75)]
    assert summary["sigma_by_stage"] == pytest.approx({0: 0.0, 1: 0.01, 2: 0.005})
    assert summary["rollout_probs_diff_by_stage"] == pytest.approx({0: 0.0, 1: 0.1, 2: 0.2})
    assert summary["seconds"] == {"model": 30.0}
    assert summary["seconds_per_step"] == {"gen": 2.0, "step": 3.5}
    assert summary["kernels"] == ["actor NVFP4 linear = A", "rollout NVFP4 linear = B"]


def test_the_table_shows_them(metrics):
    text = table(summarize(Run.read(metrics), 256, {"model": 30.0}, LOG))
    for shown in (
        "first -> last 5 steps (1280 samples each)  0.030 -> 0.100",
        "0.970 -> 0.900",
        "0.250 (0), 0.750 (12)",
        "0 | 0.01 | 0.005",
        "actor NVFP4 linear = A",
        "rollout NVFP4 linear = B",
    ):
        assert shown in text


@pytest.mark.parametrize("steps, edge", [(1, 1), (2, 1), (7, 3), (12, 5)])
def test_the_two_ends_of_a_short_run_do_not_overlap(steps, edge):
    run = Run({step: step_metrics(step) for step in range(1, steps + 1)})
    summary = summarize(run, 8, {}, "")
    assert summary["steps_per_end"] == edge and summary["samples_per_end"] == 8 * edge
    assert summary["reward"][0] == pytest.approx((1 + edge) / 200)


def test_a_run_without_a_step_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no training step"):
        summarize(Run.read(tmp_path / "absent.jsonl"), 8, {}, "")


def test_kernel_lines_are_read_once_each():
    assert kernels("nothing") == [] and len(kernels(LOG)) == 2


def test_the_plot_is_a_picture_also_of_an_unfinished_run(metrics, tmp_path):
    run = Run.read(metrics)
    run.steps[3].pop(SIGMA)
    plot(run, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_failing_run_shows_the_error_and_the_path_of_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "make_inputs", lambda out, seed, clock: None)
    code = quickstart.main(["--out", str(tmp_path / "run"), "no.such.key=1"])
    error = capsys.readouterr().err
    assert code != 0
    assert "no.such.key" in error and str(tmp_path / "run" / "train.log") in error


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_and_everything_it_started(tmp_path, monkeypatch, capfd, number, code):
    monkeypatch.setattr(quickstart, "make_inputs", lambda out, seed, clock: None)
    started = []

    def interrupted(process, out, clock):
        started.append(process)
        signal.raise_signal(number)

    monkeypatch.setattr(quickstart, "_follow", interrupted)
    try:
        ended = quickstart.main(["--out", str(tmp_path / "run")])
    except SystemExit as exit:
        ended = exit.code
    assert ended == code and started[0].poll() is not None
    assert {130: "interrupted", 143: "SIGTERM ends this process"}[code] in capfd.readouterr().err
