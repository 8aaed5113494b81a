"""Runs a program that drives engines and writes what it observes."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def observe(module: str, folder: Path, *arguments):
    """Returns the JSON that ``python -m MODULE OUT ARGUMENTS`` writes to OUT.

    Args:
        module: full name of the program.
        folder: gets OUT and the log, whose end is the message where there is no OUT.
        arguments: further arguments.
    """
    out, log = folder / "seen.json", folder / "log"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    with log.open("w") as file:
        subprocess.run(
            [sys.executable, "-m", module, out, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
            check=False,
        )
    assert out.exists(), log.read_text()[-4000:]
    return json.loads(out.read_text())
