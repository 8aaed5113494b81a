"""Runs ``engine_process.py`` in forks of one process that has verl imported, see
``tests/helpers/fork_server.py``."""

from __future__ import annotations

import os

from qerl_verl.job import Job
from tests.helpers.fork_server import serve


def import_what_the_ranks_import() -> None:
    """Imports what the ranks import. The environment, which decides what verl's import registers,
    is set first.
    """
    os.environ |= Job().environment() | {"VERL_PLATFORM": "cpu", "VERL_ENGINE_VENDOR": "qerl"}
    import verl.utils.distributed
    import verl.workers.config
    import verl.workers.engine.fsdp  # noqa: F401

    import qerl_verl.engine.nvfp4  # noqa: F401
    import qerl_verl.engine.nvfp4_critic  # noqa: F401
    from tests.engine import many_ranks  # noqa: F401


if __name__ == "__main__":
    serve(import_what_the_ranks_import)
