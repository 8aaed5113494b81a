"""Prints a table of kills: a process of a run dies at each phase of a step, and the run goes on.

    python -m tools.crash_table [--cases job:update driver:save ...] [--out FOLDER] [--set KEY=VALUE ...]

:mod:`tests.integration.killed_job` says what a case is. On two cores one takes about two minutes.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from pathlib import Path

from tests.integration.killed_job import run
from tests.integration.repeatable import PHASES
from tests.integration.tiny_job import VICTIMS, traces
from tools.long_run import by_origin


def line(row: dict) -> str:
    same = (
        "bit for bit" if not row["differences"] else f"{len(row['differences'])} differences: {row['differences'][0]}"
    )
    return (
        f"| {row['victim']} | {row['phase']} | {row['step']} | {row['ended']} | {', '.join(row['named']) or '-'} | {', '.join(row['outlived']) or '-'} | "
        f"{row['files']} | {row['lost']} | {same} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [f"{v}:{p}" for p, v in itertools.product(PHASES, ("job", *VICTIMS))]
    parser.add_argument("--cases", nargs="+", default=default, help="VICTIM:PHASE, e.g. job:update")
    parser.add_argument("--out", type=Path, help="kept; a temporary folder otherwise")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="for both runs, e.g. another trainer.v1.trainer_mode"
    )
    arguments = parser.parse_args()
    cases = [(v.replace("_", " "), p) for v, _, p in (case.partition(":") for case in arguments.cases)]
    out = arguments.out.resolve() if arguments.out else Path(tempfile.mkdtemp(prefix="crash_table_"))
    out.mkdir(parents=True, exist_ok=True)
    before = traces()
    print(
        "| killed | phase | step | job ended | named as lost | outlived it | files in the half checkpoint | steps lost | three steps after |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)

    def report(row: dict) -> None:
        print(line(row), flush=True)
        print(f"  {row['message'][:300]}", file=sys.stderr, flush=True)

    rows = run(cases, out, report, arguments.set)
    print("left behind:", by_origin(traces() - before - {out}))
    if not arguments.out:
        shutil.rmtree(out)
    return int(any(row["differences"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
