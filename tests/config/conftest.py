"""verl's configuration with the switch, composed once and copied for each test."""

from __future__ import annotations

import copy
import functools

import pytest
from omegaconf import OmegaConf, open_dict


@functools.cache
def _composed(arm: str, choices: tuple[str, ...]):
    from qerl_verl.cli.explain import compose

    return compose("ppo_trainer", [f"+qerl={arm}", *choices])


def _is_choice(override: str) -> bool:
    """Returns whether an override takes Hydra's own grammar: a choice of a group, or anything that
    is not ``key=value``."""
    key, separator, _ = override.partition("=")
    return not separator or "." not in key or key.startswith("~")


def _value(text: str):
    """Returns what a command line's ``key=text`` gives; PyYAML takes ``1e-3`` for text."""
    return OmegaConf.create(f"value: {text}").value


@pytest.fixture(scope="session")
def composed():
    """``composed(*overrides, arm="nvfp4")``: verl's ``ppo_trainer`` with the switch and a command
    line's overrides."""

    def compose(*overrides: str, arm: str = "nvfp4"):
        config = copy.deepcopy(_composed(arm, tuple(o for o in overrides if _is_choice(o))))
        with open_dict(config):
            for override in overrides:
                if not _is_choice(override):
                    key, _, value = override.lstrip("+").partition("=")
                    OmegaConf.update(config, key, _value(value), force_add=True)
        return config

    return compose


@pytest.fixture(scope="session")
def switched(composed):
    """``switched(*overrides, on_cpu=False, written=())``: the configuration after the rules, the
    lines that the user sees, and the problems. ``written`` are keys that a recipe of the user's
    writes."""
    from qerl_verl.config.checks import recipe
    from qerl_verl.config.draft import Draft
    from qerl_verl.config.keys import override_keys
    from qerl_verl.config.rules import apply_rules

    def switch(*overrides: str, on_cpu: bool = False, written: tuple[str, ...] = ()):
        if not any(o.startswith("algorithm.adv_estimator=") for o in overrides):
            overrides = ("algorithm.adv_estimator=grpo", *overrides)
        config = composed(*overrides)
        draft, keys = Draft(config), override_keys(list(overrides)) | set(written)
        apply_rules(draft, keys, on_cpu=on_cpu)
        return config, draft.lines, recipe.find_problems(config, keys)

    return switch
