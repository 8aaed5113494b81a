"""Makes the first table of docs/performance.md: comparison, baseline, target, measured value,
GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

KNOWN_SHAPES = {
    (1, 16): 2.2,
    (32, 32): 1.9,
    (64, 64): 1.6,
    (128, 128): 1.2,
    (256, 256): 0.95,
    (1024, 1024): 0.9,
}
KNOWN_SHAPES |= {(8192, 8192): 0.95}
OTHER_SHAPES = {
    (1, 16): 2.2,
    (33, 33): 1.7,
    (64, 64): 1.6,
    (100, 128): 1.25,
    (200, 256): 0.97,
    (1000, 8192): 0.97,
}
WITH_ADAPTER = 0.15
"""Relative increase of the other shapes' targets with an adapter in both GEMMs."""
WORST, LARGE_WEIGHT = 0.9, 16e6
DECODING_7B = {1: 2.0, 8: 2.0, 64: 1.5, 256: 1.2}
DECODING_32B = {8: 2.2, 64: 1.6, 256: 1.15}
DECODING_MOE = {1: 1.3, 8: 1.3, 64: 1.2, 256: 1.0}
ROUTING_K3 = 3.0
"""k3 of a mixture over that of a dense model, from which the rollout's routing should be
replayed."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        what: what was measured, and at which sizes.
        baseline: what it is compared with.
        targets: one for each size, None without a target.
        measured: one value for each size.
        at_most: whether a lower value is better.
        unit: text after each value.
    """

    what: str
    baseline: str
    targets: list[float | None]
    measured: list[float]
    at_most: bool = False
    unit: str = "x"

    def is_missed(self, index: int) -> bool:
        """Returns whether the value, as printed, misses its target."""
        target, value = self.targets[index], round(self.measured[index], 2)
        if target is None:
            return False
        return value > target if self.at_most else value < target

    def cells(self) -> list[str]:
        """Returns comparison, baseline, target and measured value; a missed value is bold."""
        sign = "at most " if self.at_most else ""
        known = [t for t in self.targets if t is not None]
        targets = sign + " / ".join(f"{t:g}" for t in known) + self.unit if known else "-"
        values = [
            f"**{value:.2f}**" if self.is_missed(index) else f"{value:.2f}" for index, value in enumerate(self.measured)
        ]
        return [self.what, self.baseline, targets, " / ".join(values) + self.unit]


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _products(
    what: str,
    baseline: str,
    data: Mapping,
    targets: Mapping[tuple[int, int], float],
    more: float = 0.0,
) -> list[Row]:
    """Returns the smallest mean over shapes for each range of tokens."""
    ratios = {int(m): found["ratio"] for m, found in data["geomean_by_tokens"].items()}
    least = {(a, b): [r for m, r in ratios.items() if a <= m <= b] for a, b in targets}
    least = {span: min(found) for span, found in least.items() if found}
    sizes = " / ".join(_span(*span) for span in least)
    wanted = [round(targets[span] + more, 2) for span in least]
    return [Row(f"{what}, {sizes} tokens", baseline, wanted, list(least.values()))]


def _worst(what: str, baseline: str, data: Mapping, more: float = 0.0) -> list[Row]:
    large = [r["ratio"] for r in data["gemm"] if r["n"] * r["k"] >= LARGE_WEIGHT]
    if not large:
        return []
    return [
        Row(
            f"{what}, worst shape of at least 16 million weights",
            baseline,
            [WORST + more],
            [min(large)],
        )
    ]


def _gemm(data: Mapping) -> list[Row]:
    return _products("GEMM, shapes of the built-in table", "cuBLAS bf16", data, KNOWN_SHAPES)


def _lora_gemm(data: Mapping) -> list[Row]:
    return _products(
        "GEMM with an adapter of rank 32, the same shapes",
        "cuBLAS bf16 with it",
        data,
        KNOWN_SHAPES,
    )


def _other_shapes(data: Mapping) -> list[Row]:
    what, baseline = "GEMM, other shapes", "cuBLAS bf16"
    return [*_products(what, baseline, data, OTHER_SHAPES), *_worst(what, baseline, data)]


def _lora_other_shapes(data: Mapping) -> list[Row]:
    what, baseline = "GEMM with an adapter of rank 32, other shapes", "cuBLAS bf16 with it"
    more = WITH_ADAPTER
    return [
        *_products(what, baseline, data, OTHER_SHAPES, more),
        *_worst(what, baseline, data, more),
    ]


def _rollout(model: str, targets: Mapping[int, float], data: Mapping) -> list[Row]:
    ratios = data.get("ratio_to_bf16_lora", {}).get("nvfp4_lora")
    if not ratios:
        return []
    sequences = [s for s in targets if f"decode {s}" in ratios]
    what = f"decoding, {model}, {' / '.join(map(str, sequences))} sequences"
    baseline = "vLLM bf16 + LoRA"
    rows = [
        Row(
            what,
            baseline,
            [targets[s] for s in sequences],
            [ratios[f"decode {s}"] for s in sequences],
        )
    ]
    if "prefill" in ratios:
        rows.append(Row(f"prefill, {model}, 8192 tokens", baseline, [1.0], [ratios["prefill"]]))
    return rows


def _training(data: Mapping) -> list[Row]:
    rows = []
    tokens = data.get("tokens")
    for against, baseline, target in (
        ("bf16_peft", "PEFT on bf16", 0.95),
        ("compressed_tensors", "decompression at each forward pass", 1.5),
    ):
        found = data.get("ratios", {}).get(f"nvfp4 against {against}")
        if found is None:
            continue
        what = f"LoRA training step, 7B, {tokens} tokens"
        rows.append(Row(f"{what}, speed", baseline, [target], [found["speed"]]))
        if against == "bf16_peft":
            rows.append(Row(f"{what}, peak memory", baseline, [0.55], [found["peak_memory"]], at_most=True))
    return rows


def _step(data: Mapping, target: float | None = 1.5) -> list[Row]:
    sizes = data.get("sizes", {"prompts": 16, "samples": 8, "prompt": 256, "response": 512})
    sequences = f"{sizes['prompts'] * sizes['samples']} x ({sizes['prompt']} + {sizes['response']}) tokens"
    what, rows = f"GRPO step of main_ppo, 7B, {sequences}", []
    for baseline, more, least in (("bf16_lora", "", target), ("bf16_lora_bypass", ", bypass mode", None)):
        run = baseline.replace("bf16", "nvfp4")
        if found := data.get(f"ratio_to_{baseline}", {}).get(run):
            rows.append(Row(what + more, f"stock verl, bf16 LoRA{more}", [least], [found["timing_s/step"]]))
    return rows


def _step_32b(data: Mapping) -> list[Row]:
    if not (run := data["runs"].get("nvfp4_lora")):
        return []
    what = "GRPO step of main_ppo, 32B on one GPU, 128 x (256 + 512) tokens"
    return [Row(what, "-", [60.0], [run["mean"]["timing_s/step"]], True, " s")]


def _without_flash_attn(data: Mapping) -> list[Row]:
    def ratio(part: str, slow: str, fast: str) -> float:
        return data[part][slow]["forward_backward_ms"] / data[part][fast]["forward_backward_ms"]

    names = {
        "attention": ("packed attention, 32B shape", "SDPA, dense mask", "dense_mask", "packed"),
        "logprobs": ("output layer and log-probabilities", "a row at a time", "row_by_row", "chunks"),
    }
    return [
        Row(f"{what}, {data[part]['tokens']} tokens", baseline, [None], [ratio(part, slow, fast)])
        for part, (what, baseline, slow, fast) in names.items()
        if part in data
    ]


def _two_gpus(data: Mapping) -> list[Row]:
    runs = data.get("training", {}).get("runs", {})
    if not {"bf16_lora", "nvfp4_lora"} <= runs.keys():
        return []
    by = {name: runs[name]["by_sequences"] for name in ("bf16_lora", "nvfp4_lora")}
    sequences = [s for s in by["nvfp4_lora"] if s in by["bf16_lora"]]
    ratios = [by["nvfp4_lora"][s]["tokens_per_s"] / by["bf16_lora"][s]["tokens_per_s"] for s in sequences]
    what = f"LoRA training step, 7B, two GPUs, {' / '.join(sequences)} sequences a GPU"
    return [Row(what, "FSDP2, bf16 LoRA", [None] * len(ratios), ratios)]


def _noise(data: Mapping) -> list[Row]:
    cost = data.get("graphs", {}).get("cost", {})
    if not cost:
        return []
    what = f"time that the norms with noise add to decoding, 7B, {' / '.join(cost)} sequences"
    return [
        Row(
            what,
            "vLLM's own norms",
            [None] * len(cost),
            [c["percent"] for c in cost.values()],
            True,
            " %",
        )
    ]


def _moe(data: Mapping) -> list[Row]:
    ratios = data.get("ratio_to_bf16", {}).get("nvfp4_lora", {})
    sequences = [s for s in DECODING_MOE if f"decode {s}" in ratios]
    if not sequences:
        return []
    what = (
        f"decoding, {data['shape'].rpartition('-')[2]} layers of 30B-A3B, {' / '.join(map(str, sequences))} sequences"
    )
    targets: list[float | None] = [DECODING_MOE[s] for s in sequences]
    return [Row(what, "vLLM bf16", targets, [ratios[f"decode {s}"] for s in sequences])]


EXPERT_KERNELS = {"marlin": "vLLM's Marlin", "triton": "our Triton kernel"}
"""Kernels of bench_experts.py that a rollout runs: the first without an adapter on the experts, the
second with one."""


def _experts(data: Mapping) -> list[Row]:
    times = data["times"]
    if not times:
        return []
    tokens = " / ".join(str(row["tokens"]) for row in times)
    return [
        Row(
            f"experts of a layer of 30B-A3B, {name}, {tokens} tokens",
            "vLLM bf16",
            [None] * len(times),
            [row["bf16"]["us"] / row[kernel]["us"] for row in times],
        )
        for kernel, name in EXPERT_KERNELS.items()
    ]


def _experts_training(data: Mapping) -> list[Row]:
    took = {(r["variant"], r["tokens"]): r["forward_ms"] + r["backward_ms"] for r in data["results"]}
    tokens = [m for variant, m in took if variant == "nvfp4" and ("bf16", m) in took]
    if not tokens:
        return []
    what = f"experts of a layer of 30B-A3B in training, {' / '.join(map(str, tokens))} tokens"
    ratios = [took["bf16", m] / took["nvfp4", m] for m in tokens]
    return [Row(what, "transformers, bf16", [None] * len(tokens), ratios)]


def _routing(data: Mapping) -> list[Row]:
    k3 = {run["kind"]: run for run in data["runs"] if run["base"] == "nvfp4"}
    if not {"mixture", "dense"} <= k3.keys():
        return []
    ratios = [k3["mixture"][key] / k3["dense"]["k3"] for key in ("k3", "k3_replayed")]
    what = "k3 of rollout and actor, 6 layers of 30B-A3B, as it is / with routing replay"
    return [Row(what, "4 layers of 7B", [ROUTING_K3] * 2, ratios, True)]


def _triton_gemm(data: Mapping) -> list[Row]:
    ratios = {m: found["measured"] for m, found in data["cublas_over_triton"].items()}
    if not ratios:
        return []
    what = f"Triton GEMM, measured launches, {' / '.join(ratios)} tokens"
    return [Row(what, "cuBLAS bf16", [None] * len(ratios), list(ratios.values()))]


def _shared_base(data: Mapping) -> list[Row]:
    modes = [data.get(mode, {}).get("card_mib") for mode in ("shared", "separate")]
    if not all(modes):
        return []
    what = "memory on the card, actor and rollout, 2 layers as wide as 7B's, `qerl.base=shared`"
    return [Row(what, "`qerl.base=separate`", [None], [modes[0] / modes[1]], True)]


def _quantizers(data: Mapping) -> list[Row]:
    methods = data["methods"]
    if not methods:
        return []
    what = f"quantizing {data['all_layers']} layers of {data['shape']}, {' / '.join(methods)}"
    seconds = [method["seconds_of_all_layers"] for method in methods.values()]
    return [Row(what, "-", [None] * len(seconds), seconds, True, " s")]


@dataclass(frozen=True)
class Comparison:
    """The rows of one result file.

    Attributes:
        rows: makes the rows from the content of a file.
        what: what is compared, in the row of a comparison without a file.
        baseline: the same.
    """

    rows: Callable[[Mapping], list[Row]]
    what: str
    baseline: str

    def cells_without_a_file(self) -> list[str]:
        """Returns the cells of the row that says that nothing was measured."""
        return [self.what, self.baseline, "-", "not measured", "-"]


ROWS: dict[str, Comparison] = {
    "grpo_step_7b": Comparison(_step, "GRPO step of main_ppo, 7B", "stock verl, bf16 LoRA"),
    "grpo_step_7b_long": Comparison(
        lambda data: _step(data, None), "GRPO step of main_ppo, 7B, 64 x (256 + 3840) tokens", "stock verl, bf16 LoRA"
    ),
    "grpo_step_32b": Comparison(_step_32b, "GRPO step of main_ppo, 32B on one GPU, 128 x (256 + 512) tokens", "-"),
    "rollout_7b": Comparison(lambda data: _rollout("7B", DECODING_7B, data), "decoding, 7B", "vLLM bf16 + LoRA"),
    "rollout_32b": Comparison(
        lambda data: _rollout("32 layers of 32B", DECODING_32B, data), "decoding, 32 layers of 32B", "vLLM bf16 + LoRA"
    ),
    "moe_30b": Comparison(_moe, "decoding, layers of 30B-A3B", "vLLM bf16"),
    "training_7b": Comparison(_training, "LoRA training step, 7B", "PEFT on bf16"),
    "two_gpus_7b": Comparison(_two_gpus, "LoRA training step, 7B, two GPUs", "FSDP2, bf16 LoRA"),
    "gemm": Comparison(_gemm, "GEMM, shapes of the built-in table", "cuBLAS bf16"),
    "lora_gemm": Comparison(_lora_gemm, "GEMM with an adapter of rank 32, the same shapes", "cuBLAS bf16 with it"),
    "gemm_other_shapes": Comparison(_other_shapes, "GEMM, other shapes", "cuBLAS bf16"),
    "lora_gemm_other_shapes": Comparison(
        _lora_other_shapes, "GEMM with an adapter of rank 32, other shapes", "cuBLAS bf16 with it"
    ),
    "triton_gemm": Comparison(_triton_gemm, "Triton GEMM, measured launches", "cuBLAS bf16"),
    "experts": Comparison(_experts, "experts of a layer of 30B-A3B", "vLLM bf16"),
    "experts_training": Comparison(
        _experts_training, "experts of a layer of 30B-A3B in training", "transformers, bf16"
    ),
    "without_flash_attn": Comparison(
        _without_flash_attn, "packed attention and log-probabilities", "SDPA with a dense mask, a row at a time"
    ),
    "noise_7b": Comparison(_noise, "time that the norms with noise add to decoding, 7B", "vLLM's own norms"),
    "routing_30b": Comparison(_routing, "k3 of rollout and actor, layers of 30B-A3B", "layers of 7B"),
    "shared_base": Comparison(
        _shared_base, "memory on the card, actor and rollout, `qerl.base=shared`", "`qerl.base=separate`"
    ),
    "quantizer_speed_7b": Comparison(_quantizers, "quantizing 7B", "-"),
}
"""Stem of a result file -> its comparison, in the order of the table."""
