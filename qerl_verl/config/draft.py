"""Changes to a configuration: proposed one by one, recorded, printed, and applied to another copy.

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from qerl_verl.config.keys import VARIABLES, get_value


@dataclass(frozen=True)
class Change:
    """One value that the switch sets.

    Attributes:
        key: dotted key in verl's configuration.
        before: the value until then; None where the key was absent.
        value: the value from then on.
        why: the reason, for the user.
    """

    key: str
    before: Any
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.value} ({self.why})"


class Draft:
    """A configuration under change.

    Args:
        config: changed in place.

    Attributes:
        config: the configuration in its current state.
        changes: changes so far, in order.
        lines: lines for the user: the changes with their reasons, and remarks between them.
    """

    def __init__(self, config: DictConfig):
        self.config = config
        self.changes: list[Change] = []
        self.lines: list[str] = []

    def get(self, key: str) -> Any:
        """Returns the value of a dotted key; None if it is absent or still ``???``."""
        return get_value(self.config, key)

    def set(self, key: str, value: Any, why: str) -> None:
        """Sets a dotted key, unless it has this value already. Environment variables, which may
        hold credentials, are set without a line for the user.
        """
        before = self.get(key)
        if before == value:
            return
        if OmegaConf.is_config(before):  # the update changes it in place
            before = OmegaConf.to_container(before)
        change = Change(key, before, value, why)
        apply(self.config, [change])
        self.changes.append(change)
        if key != VARIABLES:
            self.say(str(change))

    def say(self, line: str) -> None:
        """Adds a remark to the lines."""
        self.lines.append(line)


def apply(config: DictConfig, changes: Iterable[Change]) -> None:
    """Applies changes in place."""
    with open_dict(config):
        for change in changes:
            OmegaConf.update(config, change.key, change.value, force_add=True)
