"""Tests what a cut leaves of each benchmark, and that the same call then measures the rest.

Functions stand in for the processes and for the measurements on a GPU.
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


def ratio(record):
    def measure_shape(name, args, content):
        record(name)
        content["gemm"] += [{"m": m, "ratio": 2.0, "error": 1e-3} for m in args.tokens]

    return measure_shape


def recorded(record, value):
    """Returns a function that records its first argument, and returns ``value`` or its result."""

    def measure(first, *rest, **settings):
        record(first)
        return value(first, *rest, **settings) if callable(value) else value

    return measure


TIMES = {"forward_ms": 1.0, "forward_backward_ms": 2.0, "peak_gib": 3.0}
PART = {"tokens": 8, "dense_mask": TIMES, "packed": TIMES, "row_by_row": TIMES, "chunks": TIMES}
MODE = {
    "rollout": {"outputs": [[[1], [0.5]]], "digest": ["x"], "start_s": 1.0},
    "train": {},
    "end": {"workers_ended": True},
}
MODE["again"] = MODE["rollout"]
QUANTIZED = {"seconds": 1.0, "peak_gpu_bytes": 1, "peak_host_bytes_above_start": 1}
NONE = SimpleNamespace(end=lambda: None, stacks=str, log=Path("log"))

STAND_INS = {
    "bench_gemm": (
        ["--tokens", "1", "--shapes", "7B qkv", "7B o"],
        lambda record: {
            **{"hopper.unsupported_device": lambda: None, "copy_bandwidth": lambda: 1.0, "environment": dict},
            "measure_shape": ratio(record),
        },
    ),
    "bench_without_flash_attn": (
        [],
        lambda record: {
            **{"attention": recorded(record, PART), "logprobs": recorded(record, PART)},
            "torch": SimpleNamespace(manual_seed=int, cuda=SimpleNamespace(get_device_name=str), __version__="2"),
        },
    ),
    "bench_experts": (["--dry-run"], lambda record: {"make_inputs": None}),
    "bench_experts_training": (
        ["--shape", "tiny-moe", "--tokens", "8", "--repeats", "1", "--variants", "bf16", "nvfp4"],
        lambda record: {"build": None},
    ),
    "bench_two_gpus": (
        ["--arrangements", "divided"],
        lambda record: {
            **{"finish": lambda *rest: None, "run_here": lambda *rest: None},
            "MEASUREMENTS": {
                part: recorded(lambda args, part=part: record(part), {}) for part in ("training", "rollout")
            },
            "measure_main_ppo": recorded(record, {"steps": {}}),
        },
    ),
    "bench_shared_base": (
        [],
        lambda record: {
            **{"start_mode": lambda mode, *rest: (NONE, NONE), "run_mode": recorded(record, MODE)},
            **{"write_nvfp4": lambda *rest: None, "write_adapter": lambda *rest: None},
        },
    ),
    "bench_quantizer_speed": (
        ["--shape", "tiny"],
        lambda record: {
            **{"write_model": lambda *rest: {"layer_bytes": 1, "bytes": 10}, "shutil": SimpleNamespace(rmtree=str)},
            "subprocess": SimpleNamespace(
                PIPE=None,
                run=recorded(
                    lambda line: record(line[-1]), SimpleNamespace(returncode=0, stdout=json.dumps(QUANTIZED) + "\n")
                ),
            ),
        },
    ),
}
"""Script -> its arguments, and what replaces names of its module. None stands for the function of
that name, which records its first argument."""


@pytest.mark.parametrize("name", STAND_INS)
def test_a_cut_costs_one_step(name, tmp_path, monkeypatch):
    arguments, stand_ins = STAND_INS[name]
    bench, path, steps, cut_at = importlib.import_module(name), tmp_path / "x.json", [], [None]

    def record(step):
        steps.append(step)
        if len(steps) == cut_at[0]:
            raise KeyboardInterrupt

    for key, value in stand_ins(record).items():
        owner = importlib.import_module("shapes") if key.startswith("write_") and name == "bench_shared_base" else bench
        *before, last = key.split(".")
        for part in before:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, last, value or recorded(record, getattr(owner, last)))
    monkeypatch.setattr(result_file, "describe_machine", lambda gpu: dict.fromkeys(result_file.CONDITIONS, "the same"))
    work = ["--work", str(tmp_path / "w")] if name in ("bench_two_gpus", "bench_shared_base") else []

    def measure(cut=None):
        steps.clear()
        cut_at[0] = cut
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, *work, "--json", str(path)])
        try:
            bench.main()
        except SystemExit as end:
            assert not end.code
        except KeyboardInterrupt:
            assert cut

    measure()
    whole, number = json.loads(path.read_text()), len(steps)
    assert "incomplete" not in whole and len(whole["finished"]) == number > 1
    measure(cut=number)
    cut = json.loads(path.read_text())
    assert cut["finished"] == whole["finished"][:-1] and whole["finished"][-1] in cut["incomplete"]
    measure()
    assert len(steps) == 1 and json.loads(path.read_text()).keys() == whole.keys()
