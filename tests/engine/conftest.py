"""Provides engines in processes of their own."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.helpers.fork_server import ForkServer

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def engine_server(tmp_path_factory):
    """Starts a process of ``engine_server.py``."""
    with ForkServer(["-m", "tests.engine.engine_server"], tmp_path_factory.mktemp("engine_server") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def run_engine(engine_server):
    """Builds and trains an engine on ``world`` ranks, and returns each rank's report.

    The arguments are those of ``engine_process.py``; ``environment`` is that of its processes.
    """

    def run(checkpoint, out: Path, world: int = 1, environment: dict | None = None, **settings) -> list[dict]:
        # a file in place of a port, which another process might take
        meeting = Path(f"{out}.meeting")
        meeting.unlink(missing_ok=True)
        logs = [f"{out}.{rank}.log" for rank in range(world)]
        ranks = [
            {
                "script": str(HERE / "engine_process.py"),
                "arguments": [str(checkpoint), str(out), str(rank), str(world), "0", json.dumps(settings)],
                "environment": {"DIST_INIT_METHOD": f"file://{meeting}", **(environment or {})},
                "out": log,
                "err": log,
            }
            for rank, log in enumerate(logs)
        ]
        codes = engine_server.run(ranks)
        assert not any(codes), "\n".join(Path(log).read_text(errors="replace")[-4000:] for log in logs)
        return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(world)]

    return run


@pytest.fixture(scope="session")
def without_prefix():
    """Returns ``without_prefix(adapter, folder)``, which copies an adapter without PEFT's prefix
    ``base_model.model.``.
    """

    def copy(adapter: Path, folder: Path) -> Path:
        shutil.copytree(adapter, folder)
        file = folder / "adapter_model.safetensors"
        save_file({name.removeprefix("base_model.model."): t for name, t in load_file(file).items()}, file)
        return folder

    return copy
