"""Writes the summary, the figures and the tables of docs/performance.md from the benchmarks'
results.

    python benchmarks/report.py benchmarks/results

The text between ``<!-- summary -->`` and ``<!-- end of summary -->`` of the page is replaced, and
that between ``<!-- tables -->`` and ``<!-- end of tables -->``. A panel or table without a result
file is left out, and a row of the summary says so. The rows of a part that was cut off
(``*.incomplete.json``) are shown where there is no complete file, marked as incomplete.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from run_all import INCOMPLETE, short_name
from summary import ROWS
from update_parts import PARTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
SUMMARY, TABLES = "summary", "tables"
"""Names of the page's two generated parts, as in its marks."""


@dataclass(frozen=True)
class Results:
    """The result files of one GPU model in a folder."""

    folder: Path
    gpu: str


def gpu_of(data: dict) -> str:
    """Returns the GPU model that a result file names, without the number of GPUs."""
    places = (data, data.get("environment") or {}, data.get("made") or {})
    names = (place.get(key) for place in places for key in ("gpu", "device", "processor"))
    name = next(filter(None, names), "none")
    return re.sub(r"^\d+ x ", "", name)


def load_all(folder: Path, stem: str) -> list[dict]:
    """Returns the files of a stem, with or without a GPU's name after it, one per GPU.

    A complete file comes before an incomplete one.
    """
    found: dict[str, dict] = {}
    for path in sorted(folder.glob(f"{stem}*.json"), key=lambda path: (path.name.endswith(INCOMPLETE), path)):
        data = json.loads(path.read_text()) | {"file": path.name}
        name = path.name.removesuffix(INCOMPLETE).removesuffix(".json")
        if name in (stem, f"{stem}_{short_name(gpu_of(data))}"):
            found.setdefault(gpu_of(data), data)
    return list(found.values())


def load(results: Results, stem: str) -> dict | None:
    """Returns the file of a stem and of the results' GPU, or None."""
    return next((data for data in load_all(results.folder, stem) if gpu_of(data) == results.gpu), None)


def find_gpus(folder: Path) -> list[str]:
    """Returns the GPU models of the summary's files, the one with most files first."""
    counts = Counter(gpu_of(data) for stem in ROWS for data in load_all(folder, stem))
    return [gpu for gpu, _ in counts.most_common()]


def summary_section(folder: Path) -> str:
    """Returns the table of comparison, baseline, target, measured value and GPU, from all files.

    Values without a unit are ratios of speed.
    """
    rows = []
    for stem, comparison in ROWS.items():
        made = []
        for data in load_all(folder, stem):
            gpu, mark = data.get("gpu") or gpu_of(data), " (incomplete)" if "incomplete" in data else ""
            for row in comparison.rows(data):
                *cells, measured = row.cells()
                made.append([*cells, measured + mark, gpu])
        rows += made or [comparison.cells_without_a_file()]
    text = (
        "Above 1x, NVFP4 is faster. A bold value misses its target. For a range of tokens, the smallest ratio is shown."
    )
    return f"{table(['what', 'baseline', 'target', 'measured', 'GPU'], rows)}\n\n{text}"


def file_of(data: dict) -> str:
    """Returns a line that names the result file and what differed in its measurement."""
    missing = f"incomplete, {data['incomplete']}" if "incomplete" in data else None
    notes = "; ".join(filter(None, (missing, data.get("state") or data.get("note"))))
    return f"File: `{data['file']}`" + (f" ({notes.rstrip('.')})." if notes else ".")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def gemm_section(results: Results) -> str:
    names = {
        "gemm": "base alone, against cuBLAS",
        "gemm_no_pdl": "the same without programmatic dependent launch",
        "lora_gemm": "with an adapter of rank 32, against cuBLAS for base and adapter",
        "lora_gemm_sweep": "the same, fastest launch of all tried",
    }
    found = {name: data for name in names if (data := load(results, name))}
    if not found:
        return ""
    tokens = sorted({int(m) for data in found.values() for m in data["geomean_by_tokens"]})
    rows = []
    for name, data in found.items():
        ratios = data["geomean_by_tokens"]
        rows.append([names[name], *(f"{ratios[str(m)]['ratio']:.2f}" if str(m) in ratios else "" for m in tokens)])
    gemms = found.get("gemm", {}).get("gemm", [])
    for model in ("7B", "32B") if gemms else ():
        layer = {m: [r for r in gemms if r["m"] == m and r["shape"].startswith(model)] for m in tokens}
        ratios = (
            sum(r["cublas_us"] for r in layer[m]) / sum(r["us"] for r in layer[m]) if layer[m] else None for m in tokens
        )
        rows.append(
            [
                f"base alone, all GEMMs of a {model} layer together",
                *("" if r is None else f"{r:.2f}" for r in ratios),
            ]
        )
    of_marlin: dict[int, list[float]] = {}
    for r in gemms:
        if r.get("marlin_us"):
            of_marlin.setdefault(r["m"], []).append(r["marlin_us"] / r["us"])
    if of_marlin:
        means = (statistics.geometric_mean(of_marlin[m]) if m in of_marlin else None for m in tokens)
        rows.append(
            ["base alone, against vLLM's Marlin in the same run", *("" if m is None else f"{m:.2f}" for m in means)]
        )
        least = min(min(ratios) for ratios in of_marlin.values())
        rows.append(
            [
                f"the same, worst shape (over all tokens: {least:.2f})",
                *(f"{min(of_marlin[m]):.2f}" if m in of_marlin else "" for m in tokens),
            ]
        )
    errors = [r["max_error"] for data in found.values() for r in data["geomean_by_tokens"].values()]
    files = ", ".join(f"`{data['file']}`" for data in found.values())
    head = ["time of cuBLAS bf16 / time of NVFP4, by tokens", *map(str, tokens)]
    return f"{table(head, rows)}\n\nLargest relative error against float64: {max(errors):.2e}. Files: {files}."


def other_shapes_section(results: Results) -> str:
    """Returns the table of shapes that the built-in table of launches does not have."""
    names = {
        "gemm_other_shapes": "base alone, against cuBLAS",
        "lora_gemm_other_shapes": "with an adapter of rank 32, against cuBLAS for base and adapter",
    }
    found = {name: data for name in names if (data := load(results, name))}
    if not found:
        return ""
    tokens = sorted({int(m) for data in found.values() for m in data["geomean_by_tokens"]})
    rows, seconds = [], []
    for name, data in found.items():
        ratios = data["geomean_by_tokens"]
        rows.append([names[name], *(f"{ratios[str(m)]['ratio']:.2f}" for m in tokens)])
        large = [r for r in data["gemm"] if r["n"] * r["k"] >= 16e6]
        worst = {m: min(r["ratio"] for r in large if r["m"] == m) for m in tokens}
        rows.append(
            [f"{names[name]}: worst shape of at least 16 million weights", *(f"{worst[m]:.2f}" for m in tokens)]
        )
        untuned = load(results, f"{name}_untuned")
        if untuned:
            shapes = sorted({r["shape"] for r in untuned["gemm"]})
            for what, source in (("built-in table", untuned), ("measured launches", data)):
                means = (
                    statistics.geometric_mean(
                        r["ratio"] for r in source["gemm"] if r["m"] == m and r["shape"] in shapes
                    )
                    for m in tokens
                )
                rows.append([f"{names[name]}: {', '.join(shapes)}, {what}", *(f"{mean:.2f}" for mean in means)])
        seconds += data["tuning_seconds"].values()
    head = ["time of cuBLAS bf16 / time of NVFP4, by tokens", *map(str, tokens)]
    shapes = ", ".join(dict.fromkeys(r["shape"] for data in found.values() for r in data["gemm"]))
    gpus = " and ".join(dict.fromkeys(data["environment"]["gpu"] for data in found.values()))
    files = ", ".join(f"`{data['file']}`" for data in found.values())
    return (
        f"{table(head, rows)}\n\nShapes: {shapes}. GPU: {gpus}. Measuring the launches takes {min(seconds):.1f} to "
        f"{max(seconds):.1f} s for a shape, once for each GPU model. Files: {files}."
    )


def between_section(results: Results) -> str:
    data = load(results, "lora_gemm_between")
    if not data:
        return ""
    shapes = list(dict.fromkeys(r["shape"] for r in data["gemm"]))
    tokens = sorted({r["m"] for r in data["gemm"]})
    by = {(r["shape"], r["m"]): r for r in data["gemm"]}
    rows = [
        [shape, *(f"{by[shape, m]['us']:.1f} / {by[shape, m]['us_without_adapter']:.1f}" for m in tokens)]
        for shape in shapes
    ]
    return table(["us with / without an adapter", *map(str, tokens)], rows) + f"\n\nFile: `{data['file']}`."


def without_flash_attn_section(results: Results) -> str:
    data = load(results, "without_flash_attn")
    if not data:
        return ""
    names = {  # part and variant of the file -> row of the table
        ("attention", "dense_mask"): "attention of a layer, SDPA with a dense mask",
        ("attention", "packed"): "attention of a layer, `qerl_packed`",
        ("logprobs", "row_by_row"): "output layer and log-probabilities, a row at a time",
        ("logprobs", "chunks"): "output layer and log-probabilities, in chunks",
    }
    rows = []
    for (part, name), text in names.items():
        if part not in data:
            continue
        row = data[part][name]
        rows.append([text, f"{row['forward_ms']:.2f}", f"{row['forward_backward_ms']:.2f}", f"{row['peak_gib']:.2f}"])
    tokens = next(data[part]["tokens"] for part, _ in names if part in data)
    head = [f"{tokens} tokens, 32B shape", "forward, ms", "forward and backward, ms", "peak memory, GiB"]
    return f"{table(head, rows)}\n\nGPU: {data['gpu']}. {file_of(data)}"


def rollout_section(results: Results) -> str:
    out = []
    for stem, baseline in {"rollout_7b": "bf16_lora", "rollout_32b": "bf16_lora", "moe_30b": "bf16"}.items():
        data = load(results, stem)
        if not data or f"ratio_to_{baseline}" not in data:
            continue
        sequences = sorted(map(int, data["runs"][0]["decode"]))
        rows = []
        for what, key, prefix in (("", "tokens_per_s", ""), (", decoding alone", "decode_tokens_per_s", "decode ")):
            for run in data["runs"]:
                ratio = data[f"ratio_to_{baseline}"][run["variant"]]
                cells = [f"{run['decode'][str(s)][key]:.0f} ({ratio[f'{prefix}{s}']:.2f}x)" for s in sequences]
                prefill = f"{run['prefill_s'] * 1e3:.0f} ms ({ratio['prefill']:.2f}x)"
                rows.append([run["variant"] + what, *cells, "" if prefix else prefill])
        head = [f"{data['shape']}, tokens/s by sequences", *map(str, sequences), "prefill of 8192 tokens"]
        text = table(head, rows)
        for run in data["runs"]:
            if noise := run.get("noise"):
                cost = noise["on_s"] / noise["off_s"] - 1
                text += (
                    f"\n\nNoise on against off at {noise['sequences']} sequences: {cost:+.1%}; putting it on takes "
                    f"{noise['set_s'] * 1e3:.0f} ms a step."
                )
        out.append(f"{text}\n\n{file_of(data)}")
    return "\n\n".join(out)


def training_section(results: Results) -> str:
    out = []
    for stem in ("training_7b", "training_7b_12288", "training_32b"):
        data = load(results, stem)
        if not data or not data["runs"]:
            continue
        rows = [
            [
                name,
                f"{run['step_s']:.3f}",
                f"{run['weights_gb']:.1f}",
                f"{run['peak_gb']:.1f}",
                *ratios_of(data, name, "bf16_peft"),
                *ratios_of(data, name, "compressed_tensors"),
            ]
            for name, run in data["runs"].items()
        ]
        errors = ", ".join(f"{k} {v:.1e}" for k, v in data.get("gradient_error_against_float32", {}).items())
        head = [f"{data['shape']}, {data['tokens']} tokens", "s a step", "weights, GiB", "peak, GiB"]
        for base in ("bf16_peft", "compressed_tensors"):
            head += [f"speed, {base} = 1", "peak"]
        text = f"Error of the adapters' gradients against float32 on two layers: {errors}. " if errors else ""
        out.append(f"{table(head, rows)}\n\n{text}{file_of(data)}")
    return "\n\n".join(out)


def update_parts_section(results: Results) -> str:
    """Returns the tables of a training pass by what it computes."""
    out = []
    for stem in ("training_7b_12288", "training_32b"):
        data = load(results, stem)
        runs = {name: run for name, run in (data or {}).get("runs", {}).items() if run.get("parts_ms")}
        if not runs:
            continue
        rows = [[part, *(f"{run['parts_ms'][part]:.0f}" for run in runs.values())] for part in PARTS]
        rows.append(["together, while profiled", *(f"{run['profiled_s'] * 1e3:.0f}" for run in runs.values())])
        rows.append(
            ["without the profiler and the optimizer", *(f"{run['step_s'] * 1e3:.0f}" for run in runs.values())]
        )
        head = [f"{data['shape']}, a pass of {data['tokens']} tokens, ms", *runs]
        out.append(f"{table(head, rows)}\n\n{file_of(data)}")
    return "\n\n".join(out)


def ratios_of(data: dict, name: str, base: str) -> list[str]:
    """Returns speed and peak memory of a training step, two cells of the table."""
    ratio = data.get("ratios", {}).get(f"{name} against {base}")
    return [f"{ratio['speed']:.2f}", f"{ratio['peak_memory']:.2f}"] if ratio else ["", ""]


def step_section(results: Results) -> str:
    stems = ("grpo_step_7b", "grpo_step_7b_attention_compiled", "grpo_step_7b_long", "grpo_step_32b")
    return "\n\n".join(filter(None, (one_step_section(results, stem) for stem in stems)))


def one_step_section(results: Results, stem: str) -> str:
    data = load(results, stem)
    if not data or not data["runs"]:
        return ""
    keys = ("gen", "old_log_prob", "update_actor", "update_weights", "step")
    rows = [
        [
            name,
            *(f"{run['mean'][f'timing_s/{k}']:.2f}" if f"timing_s/{k}" in run["mean"] else "" for k in keys),
            f"{run['mean'].get('actor/perf/max_memory_allocated_gb', math.nan):.0f}",
        ]
        for name, run in data["runs"].items()
    ]
    sizes = data.get("sizes")
    what = f", {sizes['prompts']} x {sizes['samples']} x ({sizes['prompt']} + {sizes['response']})" if sizes else ""
    head = [f"{data['shape']}{what}, seconds" if what else "seconds", *keys, "peak of training, GiB"]
    return f"{table(head, rows)}\n\n{start_of(data)}{file_of(data)}"


def start_of(data: dict) -> str:
    """Returns a sentence on the time from the command to the first step; empty where it was not
    recorded."""
    ends = {name: run["start"]["first_step_ended"] for name, run in data["runs"].items() if run.get("start")}
    if not ends:
        return ""
    return f"The first step had ended after {', '.join(f'{s:.0f} s ({name})' for name, s in ends.items())}. "


def two_gpus_section(results: Results) -> str:
    """Returns the tables of the parts that ran; empty without the file."""
    data = load(results, "two_gpus_7b")
    if not data:
        return ""
    out = []
    if training := data.get("training"):
        rows = []
        for name, run in training["runs"].items():
            gathers = run["all_gather"]
            by = run["by_sequences"]
            rows.append([
                name, *(f"{by[s]['tokens_per_s']:.0f}" for s in by), *(f"{max(by[s]['peak_gb']):.1f}" for s in by),
                f"{gathers['gb']:.2f}", ", ".join(f"{b:.4g}" for b in gathers["bytes_per_weight_of_linears"]),
            ])  # fmt: skip
        by = next(iter(training["runs"].values()))["by_sequences"]
        head = [f"FSDP2, sequences of {training['length']} a GPU", *(f"tokens/s, {s}" for s in by)]
        head += [*(f"peak GiB a GPU, {s}" for s in by), "GiB gathered a step", "bytes a weight of the linears"]
        out.append(table(head, rows))
    if equality := data.get("equality"):
        keys = ("loss_difference", "grad_norm_relative", "first_gradient_relative", "adapter_of_the_way")
        rows = [[name, *(f"{run[k]:.1e}" for k in keys)] for name, run in equality["to_one_gpu"].items()]
        head = ["three updates against one GPU's", "loss", "gradient norm, relative", "first gradient, relative"]
        out.append(table([*head, "adapter, relative to its change"], rows))
    if rollout := data.get("rollout"):
        ratios = rollout.get("ratio_to_bf16_lora", {})
        sequences = sorted(map(int, next(r["decode"] for r in rollout["runs"] if "decode" in r)))
        rows = [
            [
                run["variant"],
                *(
                    f"{run['decode'][str(s)]['tokens_per_s']:.0f} ({ratios[run['variant']][str(s)]:.2f}x)"
                    for s in sequences
                ),
            ]
            for run in rollout["runs"]
            if run["variant"] in ratios
        ]
        out.append(table(["rollout divided over both, tokens/s by sequences", *map(str, sequences)], rows))
    if shards := data.get("shards"):
        rows = [
            [what.replace("_", " "), f"{shards[what]['mean']:.1e}", f"{shards[what]['max']:.1e}"]
            for what in ("without_adapter", "clean", "noised", "noised_to_clean_on_one")
        ]
        out.append(table(["log-probability, divided against one GPU", "mean difference", "largest"], rows))
    for arrangement, run in data.get("main_ppo", {}).items():
        seconds = ", ".join(f"{step['timing_s/step']:.1f}" for step in run["steps"].values())
        facts = {"norms_equal": "norms equal", "undivided_equal": "adapter tensors that all ranks hold equal"}
        facts |= {"adapters_equal": "adapters equal"} if arrangement == "replicas" else {}
        facts |= {"base_constant": "base untouched"}
        said = ", ".join(f"{text}: {'yes' if run[key] else 'no'}" for key, text in facts.items())
        out.append(
            f"main_ppo, rollout {arrangement}: {run['workers']} rollout workers after {run['rounds']} syncs: {said}. Seconds a step: {seconds}."
        )
    return "\n\n".join([*out, f"File: `{data['file']}`."])


def experts_section(results: Results) -> str:
    out = []
    if (data := load(results, "experts")) and data["times"]:
        rows = [
            [
                str(row["tokens"]),
                *(
                    f"{row[name]['us']:.1f} ({row['bf16']['us'] / row[name]['us']:.2f}x)"
                    for name in row
                    if name != "tokens"
                ),
            ]
            for row in data["times"]
        ]
        names = [name for name in data["times"][0] if name != "tokens"]
        head = ["tokens, experts of a layer of 30B-A3B, us", *names]
        out.append(f"{table(head, rows)}\n\n{file_of(data)}")
    if (data := load(results, "experts_training")) and data["results"]:
        rows = [
            [
                row["variant"],
                str(row["tokens"]),
                f"{row['forward_ms']:.2f}",
                f"{row['backward_ms']:.2f}",
                f"{row['peak_gib']:.2f}",
            ]
            for row in data["results"]
        ]
        head = ["training, experts of a layer of 30B-A3B", "tokens", "forward, ms", "backward, ms", "peak, GiB"]
        out.append(f"{table(head, rows)}\n\n{file_of(data)}")
    return "\n\n".join(out)


def triton_section(results: Results) -> str:
    data = load(results, "triton_gemm")
    if not data or not data["gemm"]:
        return ""
    tokens = sorted({row["m"] for row in data["gemm"]})
    rows = []
    for shape in dict.fromkeys(row["shape"] for row in data["gemm"]):
        us = {row["m"]: row["us"] for row in data["gemm"] if row["shape"] == shape}
        for way in ("table", "measured", "dequantize"):
            rows.append([f"{shape}, {way}", *(f"{us[m]['cublas'] / us[m][way]:.2f}" for m in tokens)])
    head = ["time of cuBLAS bf16 / time of Triton, by tokens", *map(str, tokens)]
    return f"{table(head, rows)}\n\n{file_of(data)}"


def routing_section(results: Results) -> str:
    data = load(results, "routing_30b")
    if not data or not data["runs"]:
        return ""
    keys = ("k3", "k3_replayed", "choices_differ", "tokens_differ", "experts_differ")
    rows = [
        [f"{run['kind']}, {run['base']}", run["model"], *(f"{run[key]:.2e}" if key in run else "" for key in keys)]
        for run in data["runs"]
    ]
    return f"{table(['rollout against actor', 'model', *keys], rows)}\n\n{file_of(data)}"


def noise_section(results: Results) -> str:
    data = load(results, "noise_7b")
    rows = []
    for kind in ("graphs", "eager"):
        for sequences, cost in (data or {}).get(kind, {}).get("cost", {}).items():
            rows.append([kind, sequences, f"{cost['percent']:+.2f} %", f"{cost['stock_spread']:.2f} %"])
    if not rows:
        return ""
    head = ["decoding with norms that take noise", "sequences", "time added", "spread of vLLM's own norms"]
    return f"{table(head, rows)}\n\n{file_of(data)}"


def shared_base_section(results: Results) -> str:
    data = load(results, "shared_base")
    rows = [
        [mode, *(f"{data[mode][key] or 0:.0f}" for key in ("card_mib_actor", "card_mib")), f"{start:.0f}"]
        for mode in ("separate", "shared")
        if data and mode in data and (start := data[mode]["rollout"]["start_s"])
    ]
    if not rows:
        return ""
    head = ["`qerl.base`", "MiB on the card, actor alone", "MiB, actor and rollout", "start of vLLM, s"]
    missed = [what for what, holds in data.get("verdicts", {}).items() if not holds]
    checks = f"Checks that do not hold: {', '.join(missed)}." if missed else "All checks hold."
    return f"{table(head, rows)}\n\n{checks} {file_of(data)}"


def quantizer_section(results: Results) -> str:
    data = load(results, "quantizer_speed_7b")
    if not data or not data["methods"]:
        return ""
    rows = [
        [name, f"{v['seconds']:.1f}", f"{v['gb_per_second']:.2f}", f"{v['seconds_of_all_layers']:.0f}", f"{v['peak_gpu_bytes'] / 1e9:.1f}"]
        for name, v in data["methods"].items()
    ]  # fmt: skip
    head = [f"{data['shape']}, {data['layers']} layers, {data['bytes'] / 1e9:.1f} GB", "s", "GB/s"]
    head += [f"s for {data['all_layers']} layers", "GPU, GB"]
    return f"{table(head, rows)}\n\n{file_of(data)}"


PHASES = {
    "gen": "rollout",
    "old_log_prob": "log-probabilities",
    "update_actor": "update",
    "update_weights": "weight sync",
}
"""verl's name of a phase -> its label in the figure."""

LABELS = {"bf16_lora": "bf16 LoRA", "nvfp4_lora": "NVFP4 LoRA", "bf16_peft": "bf16 LoRA", "nvfp4": "NVFP4 LoRA"}


def plot(results: Results) -> list[Path]:
    """Draws the two figures of the page from the files of one GPU.

    Returns:
        The written files; none without matplotlib. A panel without a result file is left out.
    """
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for file, panels in FIGURES.items():
        found = [(panel, data) for panel, stems in panels.items() if (data := _load_first(results, stems))]
        if not found:
            continue
        figure, axes = pyplot.subplots(1, len(found), figsize=(4.6 * len(found), 3.6), squeeze=False)
        for axis, (panel, data) in zip(axes[0], found, strict=True):
            panel(axis, data)
            axis.set_ylim(bottom=0)
        figure.suptitle(results.gpu, fontsize=9)
        figure.tight_layout()
        path = PAGE.with_name(file)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        drawn.append(path)
    return drawn


def _load_first(results: Results, stems: tuple[str, ...]) -> dict[str, dict]:
    """Returns stem -> result file, for the existing files of a panel."""
    return {stem: data for stem in stems if (data := load(results, stem))}


def _plot_step(axis, found: dict[str, dict]) -> None:
    """Plots the seconds of a GRPO step by phase, one bar per variant."""
    (data,) = found.values()
    runs = {name: run["mean"] for name, run in data["runs"].items() if name in LABELS}
    bottoms = [0.0] * len(runs)
    names = [LABELS[name] for name in runs]
    for phase, label in PHASES.items():
        heights = [mean[f"timing_s/{phase}"] for mean in runs.values()]
        axis.bar(names, heights, bottom=bottoms, label=label, width=0.6)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    steps = [mean["timing_s/step"] for mean in runs.values()]
    axis.bar(
        names,
        [s - b for s, b in zip(steps, bottoms, strict=True)],
        bottom=bottoms,
        label="other",
        width=0.6,
        color="lightgrey",
    )
    for x, seconds in enumerate(steps):
        axis.text(x, seconds, f"{seconds:.1f} s", ha="center", va="bottom")
    axis.set_title("GRPO step, 7B, seconds")
    axis.legend(fontsize=7, loc="upper right", ncol=2)
    axis.margins(y=0.3)


def _plot_decoding(axis, found: dict[str, dict]) -> None:
    """Plots the decoding speed over bf16 with LoRA, by number of sequences."""
    for stem, data in found.items():
        ratios = data["ratio_to_bf16_lora"]["nvfp4_lora"]
        points = sorted((int(key.split()[1]), ratio) for key, ratio in ratios.items() if key.startswith("decode "))
        axis.plot(*zip(*points, strict=True), marker="o", label={"rollout_7b": "7B"}.get(stem, "32B, 32 layers"))
    axis.set_title("decoding, vLLM bf16 + LoRA = 1")
    _against_tokens(axis, "sequences")


def _plot_memory(axis, found: dict[str, dict]) -> None:
    """Plots the peak memory of a LoRA training step, with the part of the weights."""
    (data,) = found.values()
    runs = {name: run for name, run in data["runs"].items() if name in LABELS}
    names = [LABELS[name] for name in runs]
    weights, peaks = [run["weights_gb"] for run in runs.values()], [run["peak_gb"] for run in runs.values()]
    axis.bar(names, weights, label="weights", width=0.6)
    axis.bar(names, [p - w for p, w in zip(peaks, weights, strict=True)], bottom=weights, label="rest", width=0.6)
    for x, peak in enumerate(peaks):
        axis.text(x, peak, f"{peak:.1f} GiB", ha="center", va="bottom")
    axis.set_title(f"LoRA training step, 7B, {data['tokens']} tokens, peak GiB", fontsize=10)
    axis.legend(fontsize=7)
    axis.margins(y=0.12)


def _plot_gemm(axis, found: dict[str, dict]) -> None:
    """Plots the speed of the GEMMs over cuBLAS, by number of tokens."""
    for stem, data in found.items():
        points = sorted((int(m), r["ratio"]) for m, r in data["geomean_by_tokens"].items())
        axis.plot(*zip(*points, strict=True), marker="o", label="base" if stem == "gemm" else "base and adapter")
    axis.set_title("GEMM, cuBLAS bf16 = 1")
    _against_tokens(axis, "tokens")


def _against_tokens(axis, label: str) -> None:
    axis.set_xlabel(label)
    axis.set_xscale("log", base=2)
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.legend(fontsize=8)


FIGURES = {
    "performance.png": {
        _plot_step: ("grpo_step_7b",),
        _plot_decoding: ("rollout_7b", "rollout_32b"),
        _plot_memory: ("training_7b",),
    },
    "performance-gemm.png": {_plot_gemm: ("gemm", "lora_gemm")},
}
"""File beside the page -> its panels, each with the stems of its result files."""


SECTIONS = {
    "One GRPO step of main_ppo": step_section,
    "Rollout": rollout_section,
    "A LoRA training step": training_section,
    "Where the time of an update goes": update_parts_section,
    "Two GPUs": two_gpus_section,
    "GEMM (`kernels/hopper/`)": gemm_section,
    "GEMM with another kernel before it, as in a model": between_section,
    "Shapes without an entry in the built-in table": other_shapes_section,
    "GEMM of the Triton kernels": triton_section,
    "In place of flash-attn": without_flash_attn_section,
    "Experts of a mixture": experts_section,
    "Routing of a mixture in rollout and actor": routing_section,
    "Norms that take noise": noise_section,
    "One copy of the base": shared_base_section,
    "Quantizing": quantizer_section,
}


def gpu_section(results: Results) -> str:
    """Returns the tables of one GPU model."""
    sections = {title: section(results) for title, section in SECTIONS.items()}
    tables = [f"#### {title}\n\n{text}" for title, text in sections.items() if text]
    return "\n\n".join([f"### {results.gpu}", *tables])


def summary(folder: Path, figures: Collection[str] = tuple(FIGURES)) -> str:
    """Returns the page's summary: the table with the targets, then the figures.

    Args:
        folder: folder of the result files, which holds at least one.
        figures: names of the existing figures.
    """
    gpu = find_gpus(folder)[0]
    shown = [f"![{Path(name).stem.replace('-', ' ')} on {gpu}]({name})" for name in figures]
    return "\n\n".join([summary_section(folder), *shown])


def tables(folder: Path) -> str:
    """Returns the tables of each GPU."""
    return "\n\n".join(gpu_section(Results(folder, gpu)) for gpu in find_gpus(folder))


def replaced(page: str, name: str, text: str) -> str:
    """Replaces the text between ``<!-- name -->`` and ``<!-- end of name -->`` of a page.

    Raises:
        ValueError: the page does not have the two marks, in this order.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no {begin} with {end} behind it")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of the JSON files")
    folder = parser.parse_args().results
    gpus = find_gpus(folder)
    if not gpus:
        parser.error(f"{folder} holds no result of a benchmark")
    drawn = [path.name for path in plot(Results(folder, gpus[0]))]
    text = replaced(PAGE.read_text(), SUMMARY, summary(folder, drawn))
    PAGE.write_text(replaced(text, TABLES, tables(folder)))
    print(f"wrote {PAGE}" + (f" and {', '.join(drawn)}" if drawn else ", no figure: matplotlib is not installed"))


if __name__ == "__main__":
    main()
