"""The ``qerl`` command: ``quantize SRC DST``, ``resolve MODEL``, ``explain NAME``, ``cluster`` and ``doctor``.

A subcommand is a function ``_add_<name>(subparsers, common)`` that declares its arguments and sets ``run``, listed in
``_COMMANDS``. ``run(arguments)`` returns the exit code. What the user can put right is raised as CheckpointError,
ExplainError or OSError and ends in one line on stderr and exit code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import qerl_verl
from qerl_verl.cli.explain import ExplainError
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.platform.signals import ends_on_signals

EXIT_ERROR = 2


def _add_quantize(subparsers, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "quantize", parents=[common], help="write an NVFP4 copy of a 16- or 32-bit Hugging Face checkpoint"
    )
    parser.add_argument("src", type=Path, help="folder with config.json and safetensors")
    parser.add_argument("dst", type=Path, help="folder to write, absent or empty")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a checkpoint in DST that this command wrote, once the new one is complete",
    )
    parser.set_defaults(run=_quantize)


def _quantize(arguments: argparse.Namespace) -> int:
    from qerl_verl.nvfp4.checkpoint import quantize_checkpoint

    dst = arguments.dst.resolve()
    quantize_checkpoint(arguments.src.resolve(), dst, replace=arguments.force)
    print(dst)
    return 0


def _add_resolve(subparsers, common: argparse.ArgumentParser) -> None:
    parser = subparsers.add_parser(
        "resolve",
        parents=[common],
        help="print the NVFP4 folder that training will use for a model, quantizing it into the cache if need be",
    )
    parser.add_argument("model", help="local folder or name on the Hugging Face hub")
    parser.add_argument("--cache-dir", type=Path, help="default: $QERL_CACHE or ~/.cache/qerl_verl")
    parser.set_defaults(run=_resolve)


def _resolve(arguments: argparse.Namespace) -> int:
    from qerl_verl.nvfp4.cache import resolve_checkpoint

    print(resolve_checkpoint(arguments.model, arguments.cache_dir).path)
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
        usage="%(prog)s NAME [key=value ...] [--config-path PATH] [--platform {cuda,cpu}] [--skip-files]",
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
        "--skip-files", action="store_true", help="data and model folders are on another machine: do not look at them"
    )
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    from qerl_verl.cli.explain import explain

    names = [word for word in arguments.words if "=" not in word and not word.startswith("~")]
    if not names:
        raise ExplainError("explain: give the name of a recipe, for example `qerl explain gsm8k_grpo`")
    arguments.words.remove(names[0])
    return explain(names[0], arguments.words, arguments.config_path, arguments.platform, not arguments.skip_files)


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


_COMMANDS = (_add_quantize, _add_resolve, _add_explain, _add_cluster, _add_doctor)


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
    except (CheckpointError, ExplainError, OSError) as error:
        if arguments.debug:
            raise
        print(f"qerl: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("qerl: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
