"""Measures the rollout speed of a mixture of experts: our NVFP4 rollout against vLLM's bf16.

    python benchmarks/bench_moe.py --json benchmarks/results/moe_30b_h100.json     # one H100
    python benchmarks/bench_moe.py --dry-run    # tiny, on the CPU

The shape is Qwen3-30B-A3B's, with random weights and fewer layers (``--layers``), so that bf16 fits
beside its KV cache. The NVFP4 engine has an adapter of rank 32 in its attention layers, as in
training. The bf16 engine has none, because vLLM's LoRA path would need buffers on the experts. With
random routers the tokens of a batch spread over nearly all experts. bench_rollout.py, which this
script runs, explains what is timed. 24 layers take about 9 GB of disk under ``--work``, 30 GB of
GPU memory in bf16, and about ten minutes.
"""

from __future__ import annotations

import argparse
import sys

from bench_rollout import VARIANTS, add_arguments, run_variants

SHAPE, DRY_SHAPE = "30B-A3B", "tiny-moe"
BASELINE = "bf16"
TARGETS = {1: (1.3, 2.0), 8: (1.3, 2.0), 64: (1.2, 1.5), 256: (1.0, 1.2)}
"""Sequences -> decoding speed over bf16 that is required, and that is aimed at."""


def judge(ratios: dict, sequences: int) -> str:
    """Returns one line about the decoding speed at one number of sequences."""
    ratio, (must, aim) = ratios[f"decode {sequences}"], TARGETS[sequences]
    verdict = "the aim is met" if ratio >= aim else "enough" if ratio >= must else "too slow"
    return f"{sequences} sequences: {ratio:.2f}x, at least {must}x, aim {aim}x: {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--layers", type=int, default=24, help="of the 48")
    variants = [BASELINE, "nvfp4_lora"]
    parser.add_argument("--variants", nargs="*", default=variants, choices=VARIANTS)
    parser.add_argument("--dry-run", action="store_true", help="a tiny shape and few tokens")
    args = parser.parse_args()
    args.shape = f"{SHAPE}-{args.layers}"
    if args.dry_run:
        args.shape, args.sequences, args.generated = DRY_SHAPE, [1, 8], 4
    result = run_variants(args, BASELINE)
    for name, ratios in result.content.get(f"ratio_to_{BASELINE}", {}).items():
        if name != BASELINE and not args.dry_run:  # with so few tokens the speed means nothing
            for sequences in sorted(TARGETS.keys() & args.sequences):
                print(f"{name}, {judge(ratios, sequences)}", flush=True)
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
