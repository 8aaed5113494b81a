"""Implements ``qerl quantize SRC DST``, which writes an NVFP4 copy of a checkpoint.

``--check DST`` verifies the bytes of one instead.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
import time
from pathlib import Path

from qerl_verl.nvfp4.errors import CheckpointError


def add_quantize(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser(
        "quantize",
        parents=[common],
        help="write an NVFP4 copy of a 16- or 32-bit Hugging Face checkpoint; or, with --check, verify one",
    )
    parser.add_argument("src", nargs="?", help="folder with config.json and safetensors, or a name on the hub")
    parser.add_argument("dst", type=Path, nargs="?", help="folder to write, absent or empty")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a checkpoint in DST that this command wrote, once the new one is complete",
    )
    parser.add_argument("--check", type=Path, metavar="DST", help="verify an NVFP4 folder, all of its bytes")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, with the report")
    add_method(parser)
    parser.set_defaults(run=_run)


def add_method(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that choose how weights are rounded."""
    parser.add_argument(
        "--method",
        choices=("rtn", "four-over-six", "gptq", "mxfp4"),
        help="default: gptq with --calibration, else four-over-six; mxfp4 is the base of +qerl=mxfp4",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="parquet, JSONL or text: what gptq looks at, and what the loss in the report is measured on",
    )
    parser.add_argument("--samples", type=int, default=128, help="sequences to calibrate with (default: %(default)s)")
    parser.add_argument("--sample-tokens", type=int, default=512, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: the GPU if there is one)")


def read_calibration_files(arguments: argparse.Namespace, model: Path):
    """Returns the calibration text of the arguments, in tokens of ``model``."""
    from qerl_verl.nvfp4.calibration import read_calibration

    return read_calibration(
        arguments.calibration, model, samples=arguments.samples, sample_tokens=arguments.sample_tokens
    )


def _run(arguments: argparse.Namespace) -> int:
    from qerl_verl.nvfp4.cache import fetch_model
    from qerl_verl.nvfp4.quantize import quantize_checkpoint
    from qerl_verl.nvfp4.report import format_report, read_report

    if arguments.check is not None:
        if arguments.src is not None:
            raise CheckpointError("--check DST verifies a folder that is there; give it without SRC and DST.")
        return _check(arguments.check.resolve(), arguments.json)
    if arguments.dst is None:
        raise CheckpointError("give SRC and DST, or --check DST.")
    src, dst = fetch_model(arguments.src).resolve(), arguments.dst.resolve()
    calibration = read_calibration_files(arguments, src) if arguments.calibration else None
    method = arguments.method or ("gptq" if calibration else "four-over-six")
    started = time.monotonic()
    try:
        quantize_checkpoint(
            src, dst, method=method, calibration=calibration, device=arguments.device, replace=arguments.force
        )
    except KeyboardInterrupt:
        if kept := sorted(dst.parent.glob(f"{glob.escape(dst.name)}.layers-*")):
            print(f"\nqerl: the finished layers are in {kept[0]}; the same command goes on from there", file=sys.stderr)
        raise
    report = read_report(dst)
    if arguments.json:
        print(json.dumps({"path": str(dst), "seconds": round(time.monotonic() - started, 3), **report}))
    else:
        print(format_report(report), file=sys.stderr)
        print(dst)
    return 0


def _check(path: Path, as_json: bool) -> int:
    from qerl_verl.nvfp4.verify import verify_checkpoint

    found = verify_checkpoint(path)
    if as_json:
        print(json.dumps({"path": str(path), **found}))
    else:
        print(f"{path}: " + ", ".join(f"{value:,} {name}" for name, value in found.items()) + ": no fault found")
    return 0
