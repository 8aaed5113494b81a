"""The ``qerl`` command: ``quantize SRC DST``, ``resolve MODEL``, ``export CHECKPOINT DST``, ``eval MODEL``, ``compare RUN...``,
``explain NAME``, ``plan NAME``, ``cluster`` and ``doctor``.

A subcommand is a function ``_add_<name>(subparsers, common)`` that declares its arguments and sets ``run``, listed in
``_COMMANDS``. ``run(arguments)`` returns the exit code. What the user can put right is raised as CheckpointError,
CompareError, EvaluationError, ExplainError or OSError and ends in one line on stderr and exit code 2; ``--debug`` shows
the traceback.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import qerl_verl
from qerl_verl.cli.compare import add_compare
from qerl_verl.cli.evaluate import add_eval
from qerl_verl.cli.explain import ExplainError
from qerl_verl.cli.plan import add_plan
from qerl_verl.compare.errors import CompareError
from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.platform.signals import ends_on_signals

EXIT_ERROR = 2


def _add_quantize(subparsers, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "quantize",
        parents=[common],
        help="write an NVFP4 copy of a 16- or 32-bit Hugging Face checkpoint; or, with --check, verify one",
    )
    parser.add_argument("src", type=Path, nargs="?", help="folder with config.json and safetensors")
    parser.add_argument("dst", type=Path, nargs="?", help="folder to write, absent or empty")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a checkpoint in DST that this command wrote, once the new one is complete",
    )
    parser.add_argument("--check", type=Path, metavar="DST", help="verify an NVFP4 folder, all of its bytes")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, with the report")
    _add_method(parser)
    parser.set_defaults(run=_quantize)


def _add_method(parser: argparse.ArgumentParser) -> None:
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


def _read_calibration(arguments: argparse.Namespace, model: Path):
    from qerl_verl.nvfp4.calibration import read_calibration

    return read_calibration(
        arguments.calibration, model, samples=arguments.samples, sample_tokens=arguments.sample_tokens
    )


def _quantize(arguments: argparse.Namespace) -> int:
    from qerl_verl.nvfp4.checkpoint import quantize_checkpoint
    from qerl_verl.nvfp4.report import format_report, read_report

    if arguments.check is not None:
        if arguments.src is not None:
            raise CheckpointError("--check DST verifies a folder that is there; give it without SRC and DST.")
        return _check(arguments.check.resolve(), arguments.json)
    if arguments.dst is None:
        raise CheckpointError("give SRC and DST, or --check DST.")
    src, dst = arguments.src.resolve(), arguments.dst.resolve()
    calibration = _read_calibration(arguments, src) if arguments.calibration else None
    method = arguments.method or ("gptq" if calibration else "four-over-six")
    started = time.monotonic()
    quantize_checkpoint(
        src, dst, method=method, calibration=calibration, device=arguments.device, replace=arguments.force
    )
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


def _add_resolve(subparsers, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "resolve",
        parents=[common],
        help="print the NVFP4 folder that training will use for a model, quantizing it into the cache if need be",
    )
    parser.add_argument("model", help="local folder or name on the Hugging Face hub")
    parser.add_argument("--cache-dir", type=Path, help="default: $QERL_CACHE or ~/.cache/qerl_verl")
    _add_method(parser)
    parser.set_defaults(run=_resolve)


def _resolve(arguments: argparse.Namespace) -> int:
    from qerl_verl.nvfp4.cache import Quantization, resolve_checkpoint

    method = arguments.method or ("gptq" if arguments.calibration else "four-over-six")
    if method == "gptq" and not arguments.calibration:
        raise CheckpointError("method gptq needs a calibration text (--calibration FILE).")
    calibration = partial(_read_calibration, arguments) if arguments.calibration else None
    quantization = Quantization(method, calibration, arguments.device)
    resolved = resolve_checkpoint(arguments.model, arguments.cache_dir, quantization)
    for note in resolved.notes:
        print(f"qerl: {note}", file=sys.stderr)
    print(resolved.path)
    return 0


def _add_export(subparsers, common: argparse.ArgumentParser) -> None:
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
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from qerl_verl.export.locate import find_adapter, find_base
    from qerl_verl.export.merge import export_adapter, export_merged

    form, dst = arguments.format, arguments.dst.resolve()
    if form == "nvfp4" and not arguments.force:
        raise CheckpointError(
            "--format nvfp4 loses most of the LoRA delta: a step of E2M1 is larger than the delta. Use merged or fp8, or serve "
            "the adapter beside its NVFP4 base; --force writes it all the same and says how much is left."
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


def _add_doctor(subparsers, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser("doctor", parents=[common], help="check that the switch works on this installation")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from qerl_verl.cli.doctor import doctor

    return doctor()


def _add_explain(subparsers, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "explain",
        parents=[common],
        help="print what a recipe and the switch set in verl's configuration, and what cannot run; starts nothing",
        usage="%(prog)s NAME [key=value ...] [--config-path PATH] [--platform {cuda,cpu}] [--elsewhere]",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="NAME | key=value",
        help="a recipe, as in --config-name, or ppo_trainer with +qerl=nvfp4 among the overrides; and overrides as on "
        "verl's command line, in any order",
    )
    parser.add_argument("--config-path", help="folder or pkg://package of NAME (default: QeRL's recipes, then verl's)")
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--elsewhere",
        action="store_true",
        help="the run takes place on another machine: do not look at this one's files, CPUs, GPUs and Ray",
    )
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from qerl_verl.cli.explain import explain

    names = [word for word in arguments.words if "=" not in word and not word.startswith("~")]
    if not names:
        raise ExplainError("explain: give the name of a recipe, for example `qerl explain gsm8k_grpo`")
    arguments.words.remove(names[0])
    return explain(names[0], arguments.words, arguments.config_path, arguments.platform, not arguments.elsewhere)


def _add_cluster(subparsers, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "cluster", parents=[common], help="wait until a Ray cluster has so many nodes and GPUs"
    )
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of all nodes together")
    parser.add_argument("--timeout", type=float, default=600, help="seconds (default: %(default)s)")
    parser.add_argument("--address", help="default: $RAY_ADDRESS, or the cluster on this machine")
    parser.set_defaults(run=_cluster)


def _cluster(arguments: argparse.Namespace) -> int:
    from qerl_verl.cli.cluster import wait_for_cluster

    return wait_for_cluster(arguments.nodes, arguments.gpus, arguments.timeout, arguments.address)


_COMMANDS = (_add_quantize, _add_resolve, _add_export, add_eval, add_compare, _add_explain, add_plan, _add_cluster, _add_doctor)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse ``argv``; words after an option belong to the words before it.

    argparse gives a positional argument of any length only what stands in one piece, and its ``parse_intermixed_args``
    does not work with subcommands.
    """
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words = [*arguments.words, *rest]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="qerl", description="QeRL for verl: NVFP4 checkpoints, recipes and the installation."
    )
    parser.add_argument("--version", action="version", version=f"qerl {qerl_verl.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in _COMMANDS:
        add(subparsers, common)
    arguments = _parse(parser, argv)
    try:
        with ends_on_signals():
            return arguments.run(arguments)
    except (CheckpointError, CompareError, EvaluationError, ExplainError, OSError) as error:
        if arguments.debug:
            raise
        text = str(error) if isinstance(error, CompareError) else " ".join(str(error).split())
        print(f"qerl: {text}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("qerl: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
