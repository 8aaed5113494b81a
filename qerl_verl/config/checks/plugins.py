"""Whether the installed versions fit, and whether verl and vLLM will load QeRL."""

from __future__ import annotations

from collections.abc import Mapping


def find_problems(environment: Mapping[str, str], installed=None) -> list[str]:
    """What keeps QeRL from being loaded, one sentence each.

    Args:
        environment: environment variables of the driver.
        installed: as for :func:`~qerl_verl.versions.version_problems`.
    """
    from qerl_verl.versions import version_problems

    versions = version_problems() if installed is None else version_problems(installed)
    policy = verl_policy_problem(environment)
    return versions + ([policy] if policy else [])


def verl_policy_problem(environment: Mapping[str, str]) -> str:
    """Whether ``VERL_USE_EXTERNAL_PLUGINS`` leaves QeRL out, read as in ``verl/__init__.py``; empty if not."""
    policy = environment.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    wanted = policy.strip().lower()
    if wanted == "auto" or "qerl" in (name.strip() for name in wanted.split(",")):
        return ""
    return (
        f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading the plugin qerl; unset it or add qerl to its list"
    )
