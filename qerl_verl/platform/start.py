"""What shortens the start of a job's processes, through Ray's settings and Python's own variables.

A run starts some ten processes one after the other, and each imports PyTorch, verl and vLLM anew
(docs/performance-start.md has the times). Nothing here changes what they compute.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from importlib.util import cache_from_source, find_spec
from pathlib import Path

RAY_ENVIRONMENT = {"RAY_prestart_worker_first_driver": "0"}
"""For Ray's own processes. Ray starts idle Python workers when the first driver connects, two on a
machine of two cores. None of them is ever used: verl gives all of its processes a runtime
environment, and Ray serves these with workers that were started with it alone."""

PACKAGES = ("torch", "transformers", "verl", "vllm")
"""Whose modules take most of an import's time."""

FOLDER = "bytecode"
"""In the cache folder: the compiled modules of installations that have none."""


def set_ray_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets :data:`RAY_ENVIRONMENT` in the driver, before it starts Ray. What is set already
    stays."""
    for name, value in RAY_ENVIRONMENT.items():
        environment.setdefault(name, value)


def find_uncompiled() -> list[str]:
    """Packages of :data:`PACKAGES` that were installed without compiled modules (``.pyc``), as some
    installers and images leave them. Nothing is imported."""
    found = []
    for package in PACKAGES:
        spec = find_spec(package)
        if spec and spec.origin and not _compiled(Path(spec.origin)).exists():
            found.append(package)
    return found


def _compiled(source: Path) -> Path:
    """Returns the compiled form of a module beside its source, whatever ``PYTHONPYCACHEPREFIX``
    says."""
    return source.parent / "__pycache__" / Path(cache_from_source(str(source))).name


def bytecode_environment(
    cache: Path, environment: Mapping[str, str], uncompiled: list[str]
) -> tuple[dict[str, str], str]:
    """Variables that make the job's processes keep compiled modules in a folder of ours, where the
    installation has none and cannot get any: else each process compiles all of its modules again,
    which doubles the time of an import.

    Args:
        cache: the cache folder.
        environment: the driver's environment variables.
        uncompiled: the result of :func:`find_uncompiled`.

    Returns:
        The variables, and a line for the user; both empty where nothing is to be done.
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
