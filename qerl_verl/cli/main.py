"""Implements the ``qerl`` command: ``quantize SRC DST``, ``resolve MODEL``, ``export CHECKPOINT
DST``, ``eval MODEL``, ``compare RUN...``, ``explain NAME``, ``plan NAME``, ``cluster`` and
``doctor``.

Each subcommand has a file of its own, whose ``add_<name>(subparsers, common)`` declares the
arguments and sets ``run``; ``_COMMANDS`` lists the subcommands. ``run(arguments)`` returns the exit
code. Errors that the user can fix are raised as CheckpointError, CompareError, EvaluationError,
ExplainError or OSError; they print one line on stderr and give exit code 2. ``--debug`` shows the
traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import qerl_verl
from qerl_verl.cli.cluster import add_cluster
from qerl_verl.cli.compare import add_compare
from qerl_verl.cli.doctor import add_doctor
from qerl_verl.cli.evaluate import add_eval
from qerl_verl.cli.explain import ExplainError, add_explain
from qerl_verl.cli.export import add_export
from qerl_verl.cli.plan import add_plan
from qerl_verl.cli.quantize import add_quantize
from qerl_verl.cli.resolve import add_resolve
from qerl_verl.compare.errors import CompareError
from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.nvfp4.errors import UNWRITABLE, CheckpointError
from qerl_verl.platform.signals import ends_on_signals

EXIT_ERROR = 2


_COMMANDS = (
    add_quantize,
    add_resolve,
    add_export,
    add_eval,
    add_compare,
    add_explain,
    add_plan,
    add_cluster,
    add_doctor,
)


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses ``argv``, where words after an option may belong to the words before it.

    argparse accepts a positional argument of any length only in one piece, and its
    ``parse_intermixed_args`` does not work with subcommands.
    """
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words = [*arguments.words, *rest]
    return arguments


def _in_words(error: Exception) -> str:
    """Returns the message of an error that the user can fix."""
    if isinstance(error, CompareError):  # a problem a line
        return str(error)
    if not isinstance(error, OSError) or error.filename is None or error.strerror is None:
        return " ".join(str(error).split())
    fix = "; choose another path" if error.errno in UNWRITABLE else ""
    return f"{error.filename}: {error.strerror}{fix}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
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
        print(f"qerl: {_in_words(error)}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("qerl: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
