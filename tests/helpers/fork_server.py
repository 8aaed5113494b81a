"""Runs Python programs in forks of one process that has imported what they import.

    python -m tests.helpers.fork_server MODULE ...

Reads a request a line from standard input, a list of programs that start together::

    [{"script": path | "module": name | "code": text, "arguments": [...], "environment": {...},
      "cwd": path, "out": path, "err": path}, ...]

Answers with a line on standard output, the list of their exit codes. Exit handlers of a program do
not run.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Where a server starts: ``python -m`` finds the modules of the tests there."""

SECONDS = 900
"""What a program may take before it is killed."""


def _exit_code(error: SystemExit) -> int:
    """Returns the exit code as Python does, which prints anything that is not a number."""
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _run(program: dict) -> None:
    if "script" in program:
        runpy.run_path(program["script"], run_name="__main__")
    elif "module" in program:
        runpy.run_module(program["module"], run_name="__main__", alter_sys=True)
    else:
        exec(compile(program["code"], "<code>", "exec"), {"__name__": "__main__"})


def _start(program: dict) -> int:
    """Forks, and returns the process id."""
    process = os.fork()
    if process:
        return process
    signal.alarm(SECONDS)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(program[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), stream)
    os.environ |= program.get("environment", {})
    if "cwd" in program:
        os.chdir(program["cwd"])
        sys.path[0] = program["cwd"]  # as for `python -m` and `python -c`
    sys.argv = [program.get("script", program.get("module", "-c")), *program.get("arguments", [])]
    code = 1
    try:
        _run(program)
        code = 0
    except SystemExit as error:
        code = _exit_code(error)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(prepare) -> None:
    """Calls ``prepare``, then answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of imports must not be taken for an answer
    prepare()
    for line in sys.stdin:
        processes = [_start(program) for program in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(codes), file=answers, flush=True)


class ForkServer:
    """A context manager that starts a server and talks to it.

    Args:
        command: the server's command, after the interpreter.
        log: file for the server's own output.
    """

    def __init__(self, command: list, log: Path):
        self._command, self._log = [sys.executable, *map(str, command)], log

    def __enter__(self) -> ForkServer:
        with self._log.open("w") as file:
            self._server = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, cwd=ROOT
            )
        return self

    def __exit__(self, *error) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, programs: list[dict]) -> list[int]:
        """Runs programs side by side and returns their exit codes."""
        print(json.dumps(programs), file=self._server.stdin, flush=True)
        answer = self._server.stdout.readline()
        assert answer, f"{' '.join(self._command[1:3])} ended:\n{self._log.read_text()[-4000:]}"
        return json.loads(answer)


if __name__ == "__main__":
    serve(lambda: [importlib.import_module(name) for name in sys.argv[1:]])
