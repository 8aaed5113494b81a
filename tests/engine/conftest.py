"""Engines in processes of their own."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "engine_process.py"


def run(checkpoint, out: Path, world: int = 1, **settings) -> list[dict]:
    """Build and train an engine on ``world`` ranks; returns each rank's report."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, checkpoint, out, str(rank), str(world), str(port), json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [r.communicate(timeout=300)[0] for r in ranks]
    assert all(r.returncode == 0 for r in ranks), "\n".join(o[-4000:] for o in outputs)
    return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture(scope="session")
def run_engine():
    """:func:`run`."""
    return run
