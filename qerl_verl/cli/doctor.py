"""Implements ``qerl doctor``, which checks whether the switch works on this installation."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib.metadata import entry_points, version

from qerl_verl.config.arms import ARMS

_COMPOSE = """
import verl, os, sys
from hydra import compose, initialize_config_dir
with initialize_config_dir(os.path.join(os.path.dirname(verl.__file__), "trainer", "config"), version_base=None):
    nodes = [compose("ppo_trainer", overrides=[f"+qerl={arm}"]).qerl for arm in sys.argv[1:]]
sys.exit(0 if "qerl_verl.plugin" in sys.modules and all("aqn" in node for node in nodes) else 3)
"""


def add_doctor(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser("doctor", parents=[common], help="check that the switch works on this installation")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    return doctor()


def checks() -> list[tuple[str, str]]:
    """Returns pairs of a check and its problem; the problem is empty if the check passed."""
    from qerl_verl.config.checks.plugins import verl_policy_problem, vllm_policy_problem
    from qerl_verl.versions import SUPPORTED, version_problems

    results = [("versions of " + ", ".join(SUPPORTED), "; ".join(version_problems()))]
    for group in ("verl.plugins", "vllm.general_plugins"):
        found = any(e.name == "qerl" for e in entry_points(group=group))
        results.append((f"entry point {group}", "" if found else "not installed: reinstall qerl-verl with pip"))
    results.append(("verl's plugin policy", verl_policy_problem(os.environ)))
    results.append(("vLLM's plugin policy", vllm_policy_problem(os.environ)))
    run = subprocess.run([sys.executable, "-c", _COMPOSE, *ARMS], capture_output=True, text=True)
    failed = run.stderr.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
    results.append((f"Hydra composes +qerl={' | '.join(ARMS)}", "" if run.returncode == 0 else failed[0]))
    results.append(("device", "" if _device_matches_vllm() else _device_problem()))
    return results


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _device_matches_vllm() -> bool:
    return _gpu() == ("cpu" not in version("vllm"))


def _device_problem() -> str:
    if _gpu():
        return "a GPU is visible, but vLLM is its CPU build; install the extra [gpu]"
    return "no GPU is visible, but vLLM is a CUDA build; only a Ray cluster with GPUs can run it"


def kernels() -> str:
    """Returns the kernels of NVFP4 layers on this machine, and why no better one serves."""
    import torch

    from qerl_verl.kernels.backends import choose_backend

    device = torch.device("cuda", torch.cuda.current_device()) if _gpu() else torch.device("cpu")
    return choose_backend(device).sentence(device)


def arms() -> list[str]:
    """Returns one line for each arm, with whether its packages are installed."""
    from qerl_verl.config.checks.arms import missing_packages

    missing = {name: missing_packages(arm) for name, arm in ARMS.items()}
    return [
        f"+qerl={name}: {'; '.join(p.partition(': ')[2] for p in found) or 'ready'}" for name, found in missing.items()
    ]


def doctor() -> int:
    """Prints the checks, the kernels and the arms. Returns 1 if a check failed, otherwise 0."""
    from qerl_verl.versions import untested_versions

    results = checks()
    for name, problem in results:
        print(f"{'FAIL' if problem else ' ok '} {name}{': ' + problem if problem else ''}")
    if line := untested_versions():
        print(f"      {line}")
    print(f"      kernels of actor and critic here: {kernels()}")
    for line in arms():
        print(f"      {line}")
    return int(any(problem for _, problem in results))
