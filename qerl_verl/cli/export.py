"""Implements ``qerl export CHECKPOINT DST``, which converts a run's checkpoint for other
programs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qerl_verl.nvfp4.errors import CheckpointError


def add_export(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser(
        "export",
        parents=[common],
        help="write what other programs load from a checkpoint of a run: the adapter, or a merged model",
    )
    parser.add_argument("checkpoint", type=Path, help="global_step_N of a run, or the folder of a PEFT adapter")
    parser.add_argument("dst", type=Path, help="folder to write, absent or empty")
    parser.add_argument(
        "--format",
        choices=("adapter", "merged", "fp8", "nvfp4"),
        default="merged",
        help="adapter: in PEFT's format; merged: a 16-bit model; fp8: for serving, compressed-tensors FP8_DYNAMIC; nvfp4: "
        "rounded to 4 bits again, with --force (default: %(default)s)",
    )
    parser.add_argument("--base", type=Path, help="folder of the base (default: the one that the checkpoint records)")
    parser.add_argument("--cache-dir", type=Path, help="default: $QERL_CACHE or ~/.cache/qerl_verl")
    parser.add_argument("--force", action="store_true", help="write nvfp4, which loses most of what was learned")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qerl_verl.export.locate import find_adapter, find_base
    from qerl_verl.export.merge import export_adapter, export_merged

    form, dst = arguments.format, arguments.dst.resolve()
    if form == "nvfp4" and not arguments.force:
        raise CheckpointError(
            "--format nvfp4 loses most of the LoRA delta: a step of E2M1 is larger than the "
            "delta. Use merged or fp8, or serve the adapter beside its NVFP4 base; --force writes "
            "it anyway and says how much is left."
        )
    source = find_adapter(arguments.checkpoint.resolve())
    if form == "adapter":
        done = export_adapter(source.adapter, arguments.base, dst)
    else:
        base = find_base(source, arguments.base, arguments.cache_dir)
        done = {"base": str(base)} | export_merged(base, source.adapter, dst, form, device=arguments.device)
    if arguments.json:
        print(json.dumps({"path": str(dst), "format": form, **done}))
        return 0
    if "delta_kept" in done:
        print(f"qerl: {done['delta_kept']:.1%} of the LoRA delta is left in the NVFP4 weights", file=sys.stderr)
    print(dst)
    return 0
