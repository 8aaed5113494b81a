"""Dotted keys of a Hydra configuration: reading one, setting one, and which of them the user wrote.

Importable without torch, verl or vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

Get = Callable[[str], Any]
"""Value of a dotted key, None where it is absent or has no value yet."""


def get_value(config: DictConfig, key: str) -> Any:
    """Value of ``key``; None where it is absent or still ``???``."""
    if OmegaConf.is_missing(_parent(config, key), key.rpartition(".")[2]):
        return None
    return OmegaConf.select(config, key)


def set_value(config: DictConfig, key: str, value: Any, why: str, notify: Callable[[str], None]) -> None:
    """Set ``key`` and say so in one line, unless it has this value already."""
    before = get_value(config, key)
    if before == value:
        return
    OmegaConf.update(config, key, value, force_add=True)
    if not key.endswith("env_vars"):
        notify(f"{key}: {before} -> {value} ({why})")


def _parent(config: DictConfig, key: str) -> Any:
    parent = key.rpartition(".")[0]
    return (OmegaConf.select(config, parent) if parent else config) or OmegaConf.create()


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys of a configuration and their values, interpolations as they are written."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    out = {}
    for key, value in node.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def override_keys(overrides: list[str]) -> set[str]:
    """Dotted keys of command line overrides: ``["+a.b=1", "~c"]`` gives ``{"a.b", "c"}``."""
    return {o.lstrip("+~").partition("=")[0] for o in overrides}


def is_written(key: str, keys: set[str]) -> bool:
    """Whether ``key``, or a group that it lies in, is among the keys that the user wrote."""
    return any(key == written or key.startswith(f"{written}.") for written in keys)
