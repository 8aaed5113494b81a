"""Runs ``engine_process.py`` in forks of one process that has verl imported, which costs five seconds of CPU time once.

Reads a request a line from standard input, ``[{"arguments": [...], "environment": {...}, "log": path}, ...]``: the ranks of one
run, which start together. Answers with a line on standard output, the list of their exit codes.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path

SCRIPT = Path(__file__).with_name("engine_process.py")
SECONDS = 900
"""What a rank may take before it is killed."""


def import_what_the_ranks_import() -> None:
    """Their environment decides what the import of verl registers, so it is set first."""
    os.environ |= {"QERL_SWITCH": "nvfp4", "VERL_PLATFORM": "cpu", "VERL_ENGINE_VENDOR": "qerl"}
    import many_ranks  # noqa: F401
    import verl.utils.distributed
    import verl.workers.config
    import verl.workers.engine.fsdp  # noqa: F401

    import qerl_verl.engine.fsdp  # noqa: F401


def start(rank: dict) -> int:
    """Fork; returns the process id."""
    process = os.fork()
    if process:
        return process
    signal.alarm(SECONDS)
    log = os.open(rank["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ |= rank["environment"]
    sys.argv = [str(SCRIPT), *rank["arguments"]]
    code = 1
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    import_what_the_ranks_import()
    for line in sys.stdin:
        processes = [start(rank) for rank in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    main()
