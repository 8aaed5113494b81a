"""Checks of the installed versions, and of whether verl and vLLM will load QeRL."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType


def find_problems(
    environment: Mapping[str, str], job_environment: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Returns why QeRL would not be loaded, one sentence each.

    Args:
        environment: environment variables of the driver, which a Ray that it starts passes on.
        job_environment: additional variables of the job's processes
            (``ray_init.runtime_env.env_vars``).
    """
    from qerl_verl.versions import version_problems

    problems = version_problems()
    for variables in (environment, {**environment, **job_environment}):
        for policy in (verl_policy_problem, vllm_policy_problem):
            problem = policy(variables)
            if problem and problem not in problems:
                problems.append(problem)
    return problems


def verl_policy_problem(environment: Mapping[str, str]) -> str:
    """Returns the problem of a ``VERL_USE_EXTERNAL_PLUGINS`` that excludes QeRL, read as in
    ``verl/__init__.py``; empty if it does not.
    """
    policy = environment.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    wanted = policy.strip().lower()
    if wanted == "auto" or "qerl" in (name.strip() for name in wanted.split(",")):
        return ""
    return (
        f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading the plugin qerl; unset it or add qerl to its list"
    )


def vllm_policy_problem(environment: Mapping[str, str]) -> str:
    """Returns the problem of a ``VLLM_PLUGINS`` that excludes QeRL, read as in ``vllm/envs.py``;
    empty if it does not.

    vLLM would then serve the checkpoint with layers of its own, without the adapter, and report
    nothing.
    """
    names = environment.get("VLLM_PLUGINS")
    if names is None or "qerl" in names.split(","):
        return ""
    return f"VLLM_PLUGINS={names} keeps vLLM from loading the plugin qerl; unset it or add qerl to its list"
