"""Implements ``qerl resolve MODEL``, which prints the NVFP4 folder that a run uses for a model."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from qerl_verl.cli.quantize import add_method, read_calibration_files
from qerl_verl.nvfp4.errors import CheckpointError


def add_resolve(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser(
        "resolve",
        parents=[common],
        help="print the NVFP4 folder that training will use for a model, quantizing it into the cache if need be",
    )
    parser.add_argument("model", help="local folder or name on the Hugging Face hub")
    parser.add_argument("--cache-dir", type=Path, help="default: $QERL_CACHE or ~/.cache/qerl_verl")
    add_method(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from qerl_verl.nvfp4.cache import Quantization, resolve_checkpoint

    method = arguments.method or ("gptq" if arguments.calibration else "four-over-six")
    if method == "gptq" and not arguments.calibration:
        raise CheckpointError("method gptq needs a calibration text (--calibration FILE).")
    calibration = partial(read_calibration_files, arguments) if arguments.calibration else None
    quantization = Quantization(method, calibration, arguments.device)
    resolved = resolve_checkpoint(arguments.model, arguments.cache_dir, quantization)
    for note in resolved.notes:
        print(f"qerl: {note}", file=sys.stderr)
    print(resolved.path)
    return 0
