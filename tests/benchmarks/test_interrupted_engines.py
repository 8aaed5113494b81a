"""Tests of the benchmarks that start a process for each engine or run: what a cut leaves behind.

The processes are stood in for by a function that answers with a result of theirs.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import result_file

ROLLOUT = {"decode": {"8": {"tokens_per_s": 2.0, "decode_tokens_per_s": 3.0}}, "prefill_s": 0.5, "start_s": 1.0}
NOISE = {
    "decode_s": {"8": 1.0},
    "log_probabilities": [0.5],
    "graphs_see_noise": True,
    "off_again": True,
    "repeats_itself": True,
}
STEP = "step:{} - timing_s/step:2.0 - timing_s/gen:1.0\n"

ENGINES = {
    "bench_rollout": ([], lambda line: ROLLOUT | {"variant": line[line.index("--variant") + 1]}),
    "bench_moe": (["--sequences", "8"], lambda line: ROLLOUT | {"variant": line[line.index("--variant") + 1]}),
    "bench_training": (["--variants", "bf16_peft", "nvfp4"], lambda line: {"step_s": 1.0, "peak_gb": 2.0}),
    "bench_noise": (
        ["--rounds", "1"],
        lambda line: NOISE | dict(zip(("noise", "eager"), (x == "True" for x in line[line.index("--engine") + 1 :]))),
    ),
    "bench_routing": (["--bases", "nvfp4"], lambda line: {"k3": 1e-3, "k3_replayed": 1e-3}),
    "bench_grpo_step": ([], lambda line: None),
}
"""Script -> its arguments, and the result of one of its processes from its command line."""


@pytest.mark.parametrize("name", ENGINES)
def test_a_cut_costs_one_engine(name, tmp_path, monkeypatch, capsys):
    arguments, answer = ENGINES[name]
    bench = importlib.import_module(name)
    path, calls, cut_at = tmp_path / "x.json", [], [None]

    def run(line, *rest, **settings):
        calls.append(line)
        if len(calls) == cut_at[0]:
            raise KeyboardInterrupt
        if name == "bench_grpo_step" and "verl.trainer.main_ppo" in line:
            return 0, STEP.format(1) + STEP.format(2)
        return SimpleNamespace(stdout=f"RESULT {json.dumps(answer(line))}\n", returncode=0)

    def measure(cut=None):
        calls.clear()
        cut_at[0] = cut
        work = [] if name == "bench_training" else ["--work", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, *work, "--json", str(path)])
        with pytest.raises(KeyboardInterrupt if cut else SystemExit) as ended:
            bench.main()
        return None if cut else ended.value.code

    monkeypatch.setattr(result_file, "describe_machine", lambda gpu: dict.fromkeys(result_file.CONDITIONS, "the same"))
    starts = sys.modules["bench_rollout"] if name == "bench_moe" else bench
    monkeypatch.setattr(starts, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    if name == "bench_grpo_step":
        monkeypatch.setattr(bench, "run", run)
    if name == "bench_routing":
        models = [(kind, "nvfp4", Path(kind)) for kind in ("mixture", "dense")]
        monkeypatch.setattr(bench, "prepare", lambda args: models)

    assert measure() == 0
    whole, number = json.loads(path.read_text()), len(calls)
    assert "incomplete" not in whole and len(whole["finished"]) > 1
    measure(cut=number)
    cut = json.loads(path.read_text())
    assert cut["finished"] == whole["finished"][:-1] and cut["incomplete"] == f"without {whole['finished'][-1]}"
    assert measure() == 0 and len(calls) < number
    again = json.loads(path.read_text())
    again["made"].pop("seconds"), whole["made"].pop("seconds")
    assert again == whole
