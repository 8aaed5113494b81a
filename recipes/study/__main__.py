"""Prepares and runs the study: ``python -m qerl_verl.recipes.study prepare | run``, see
docs/study.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qerl_verl.recipes.study import prepare, runs


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qerl_verl.recipes.study", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("prepare", help="data, and the supervised start of SmolLM2")
    make.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the study (default: %(default)s)")
    make.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or name on the hub")
    make.add_argument("--local-dir", type=Path, help="folder with GSM8K's train.jsonl and test.jsonl; default: the hub")
    make.add_argument("--remaining", type=int, default=1, help="lines of a solution left to write (default: 1)")
    make.add_argument("--epochs", type=float, default=3.0)
    make.add_argument("--lr", type=float, default=4e-4)
    make.add_argument("--batch-size", type=int, default=64)
    part = make.add_mutually_exclusive_group()
    part.add_argument("--data-only", action="store_true", help="leave the supervised start out")
    part.add_argument("--start-only", action="store_true", help="the supervised start alone; also under torchrun")
    run = commands.add_parser("run", help="arms and seeds, several side by side; goes on where it was interrupted")
    run.add_argument("arms", nargs="+", metavar="ARM[:SEEDS]", help="a recipe of the study, e.g. nvfp4:1-5 or bf16:1,3")
    run.add_argument("--out", type=Path, default=Path("runs/study"))
    run.add_argument("--scale", default="smollm2", choices=runs.SCALES)
    run.add_argument("--gpus", default="0", help="comma-separated; `none` on a CPU (default: %(default)s)")
    run.add_argument("--per-gpu", type=int, default=1, help="runs side by side on one GPU (default: 1)")
    run.add_argument("--stagger", type=float, default=0.0, help="seconds between two starts")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run; may be repeated")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.command == "prepare":
        prepare.check_folder(arguments.out)
        if not arguments.start_only:
            counts = prepare.write_data(arguments.local_dir, arguments.out / "data", arguments.remaining)
            print(", ".join(f"{name} {count}" for name, count in counts.items()), "problems in", arguments.out / "data")
        if not arguments.data_only:
            record = prepare.train_start(
                arguments.model,
                arguments.out / "data" / "start.parquet",
                arguments.out / "model",
                arguments.epochs,
                arguments.lr,
                arguments.batch_size,
            )
            print(record)
        return 0
    wanted = [run for text in arguments.arms for run in runs.parse_arm(text)]
    gpus = [] if arguments.gpus == "none" else arguments.gpus.split(",")
    return runs.run_all(
        wanted, arguments.out, arguments.scale, gpus, arguments.per_gpu, arguments.stagger, arguments.set
    )


if __name__ == "__main__":
    sys.exit(main())
