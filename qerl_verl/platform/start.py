"""Shortens the start of a job's processes, through Ray's settings and Python's environment
variables.

A run starts about ten processes one after the other, and each imports PyTorch, verl and vLLM
(docs/performance-start.md has the times). Nothing here changes what they compute.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from importlib.util import cache_from_source, find_spec
from pathlib import Path

RAY_ENVIRONMENT = {"RAY_prestart_worker_first_driver": "0"}
"""Environment variables of Ray's own processes.

Ray starts idle Python workers when the first driver connects, two on a machine of two cores. None
of them is ever used: verl gives all of its processes a runtime environment, and Ray serves such
processes only with workers that were started with the same environment.
"""

PACKAGES = ("torch", "transformers", "verl", "vllm")
"""Packages whose modules take most of an import's time."""

FOLDER = "bytecode"
"""Folder in the cache folder for the compiled modules of installations without any."""


def set_ray_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets :data:`RAY_ENVIRONMENT` in the driver, before it starts Ray. Variables that are set
    already stay.
    """
    for name, value in RAY_ENVIRONMENT.items():
        environment.setdefault(name, value)


def find_uncompiled() -> list[str]:
    """Returns the packages of :data:`PACKAGES` that were installed without compiled modules
    (``.pyc``), as some installers and images do. Imports nothing.
    """
    found = []
    for package in PACKAGES:
        spec = find_spec(package)
        if spec and spec.origin and not _compiled(Path(spec.origin)).exists():
            found.append(package)
    return found


def _compiled(source: Path) -> Path:
    """Returns the path of a module's compiled form beside its source, whatever
    ``PYTHONPYCACHEPREFIX`` says.
    """
    return source.parent / "__pycache__" / Path(cache_from_source(str(source))).name


def bytecode_environment(
    cache: Path, environment: Mapping[str, str], uncompiled: list[str]
) -> tuple[dict[str, str], str]:
    """Returns environment variables that let the job's processes cache compiled modules in the
    cache folder.

    They are needed where the installation has no compiled modules and cannot be written to.
    Otherwise each process compiles all of its modules, which doubles the time of an import.

    Args:
        cache: the cache folder.
        environment: the driver's environment variables.
        uncompiled: the result of :func:`find_uncompiled`.

    Returns:
        The variables, and a line for the user; both empty if nothing is to be done.
    """
    if not uncompiled or environment.get("PYTHONPYCACHEPREFIX"):
        return {}, ""
    specs = [find_spec(package) for package in uncompiled]
    folders = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None]
    if not environment.get("PYTHONDONTWRITEBYTECODE") and all(os.access(f, os.W_OK) for f in folders):
        return {}, ""  # the first process writes them where they belong
    folder = cache / FOLDER
    line = (
        f"start: {', '.join(uncompiled)} came without compiled modules (.pyc), and they cannot be "
        f"written beside the sources; the job's processes keep them in {folder}"
    )
    return {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}, line
