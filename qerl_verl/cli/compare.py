"""Implements ``qerl compare RUN...``: curves, tables and intervals of several runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from qerl_verl.compare.errors import CompareError

_LABEL_WIDTH, _CELL_WIDTH = 40, 20
_PIPE_WIDTH = 160
_SETTINGS_SHOWN = 15


def add_compare(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser(
        "compare",
        parents=[common],
        help="compare training runs: curves and final values with intervals over seeds",
        usage="%(prog)s RUN [RUN ...] [--baseline ARM] [--json FILE] [--png FILE] [--html FILE] ...",
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="RUN",
        help="a metrics file of verl's file logger, a console log, or a folder with either; or "
        "ARM=GLOB, whose matches are seeds of one arm. Runs whose names differ in a seed at the end (_s1, -seed1) are one arm",
    )
    parser.add_argument(
        "--baseline",
        metavar="ARM",
        help="what the other arms are compared with (default: the first)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all numbers; - writes them to stdout in place of the tables"
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the figure")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one page with figure and tables")
    parser.add_argument("--title", default="", help="of the figure and the page")
    parser.add_argument("--reward", default="critic/score/mean", metavar="METRIC", help="default: %(default)s")
    parser.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="METRIC",
        help="show this one, too; repeatable",
    )
    parser.add_argument(
        "--window",
        type=_positive,
        default=10,
        help="steps of first and last values (default: %(default)s)",
    )
    parser.add_argument(
        "--smooth",
        type=_odd,
        default=5,
        help="steps of the centred moving average, odd; 1: none (default: %(default)s)",
    )
    parser.add_argument(
        "--reach",
        type=float,
        action="append",
        default=[],
        metavar="REWARD",
        help="count the steps to this reward; repeatable (default: the baseline's last value)",
    )
    parser.add_argument("--up-to", type=_positive, metavar="STEP", help="look at no later step")
    parser.add_argument("--min-steps", type=_positive, default=1, metavar="N", help="leave shorter runs out")
    parser.add_argument("--confidence", type=_share, default=0.95, help="of the intervals (default: %(default)s)")
    parser.add_argument(
        "--resamples",
        type=_positive,
        default=5000,
        metavar="N",
        help="of the bootstrap (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    parser.add_argument(
        "--allow-differences",
        action="store_true",
        help="compare runs with other data, rewards or lengths; every output names the difference",
    )
    parser.add_argument("--all", action="store_true", help="print the means over the first and over all steps, too")
    parser.set_defaults(run=_run)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _odd(text: str) -> int:
    value = _positive(text)
    if value % 2 == 0:
        raise argparse.ArgumentTypeError(f"{text} is even; a centred average takes an odd number of steps")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


STDOUT = Path("-")


def _run(arguments: argparse.Namespace) -> int:
    from qerl_verl.compare import figure, page
    from qerl_verl.compare.arms import group_runs
    from qerl_verl.compare.comparison import Options, compare, to_json
    from qerl_verl.compare.statistics import Bootstrap

    on_stdout = arguments.json == STDOUT
    files = [path for path in (arguments.json, arguments.png, arguments.html) if path and path != STDOUT]
    for path in files:
        if not path.resolve().parent.is_dir():
            raise CompareError(f"{path}: there is no folder {path.resolve().parent}")
    options = Options(
        baseline=arguments.baseline,
        reward=arguments.reward,
        more=tuple(arguments.metric),
        window=arguments.window,
        smooth=arguments.smooth,
        reach=tuple(arguments.reach),
        up_to=arguments.up_to,
        min_steps=arguments.min_steps,
        bootstrap=Bootstrap(arguments.resamples, arguments.confidence, arguments.seed),
        allow_differences=arguments.allow_differences,
    )
    grouping = group_runs(arguments.words)
    comparison = compare(grouping.arms, options, grouping.notes)
    if arguments.json:
        text = json.dumps(to_json(comparison), indent=1, allow_nan=False)
        print(text) if on_stdout else arguments.json.write_text(text + "\n")
    if arguments.png or arguments.html:
        picture = figure.draw(comparison, arguments.title)
        if arguments.png:
            arguments.png.write_bytes(picture)
        if arguments.html:
            page.write(comparison, arguments.html, picture, arguments.title)
    if not on_stdout:
        show(comparison, arguments.all)
    for path in files:
        print(f"qerl: wrote {path}", file=sys.stderr)
    return 0


def show(comparison, everything: bool = False) -> None:
    """Prints the tables, with as many arms side by side as the terminal is wide.

    Args:
        comparison: what to show.
        everything: see :func:`qerl_verl.compare.tables.tables`.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    from qerl_verl.compare.tables import explain_intervals, settings_table, tables

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)

    def print_table(table) -> None:
        shown = RichTable(title=escape(table.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for index, head in enumerate(table.head):
            shown.add_column(
                escape(head),
                justify="left" if index == 0 or head == "names" else "right",
                overflow="fold",
            )
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)

    for note in comparison.agreement.conflicts:
        console.print(f"[bold red]NOT THE SAME:[/] {escape(note)}")
    most = max(1, math.floor((console.width - _LABEL_WIDTH) / _CELL_WIDTH))
    first, *rest = tables(comparison, everything)
    print_table(first)
    for table in rest:
        for part in table.columns(most):
            print_table(part)
    if settings := settings_table(comparison):
        left = len(settings.rows) - _SETTINGS_SHOWN
        del settings.rows[_SETTINGS_SHOWN:]
        for part in settings.columns(most):
            print_table(part)
        if left > 0:
            console.print(f"and {left} more settings (--json and --html list all)")
    for text in explain_intervals(comparison):
        console.print(escape(text))
    for note in comparison.notes:
        if not note.startswith("NOT THE SAME"):
            console.print(f"- {escape(note)}")
