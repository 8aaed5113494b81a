"""Reads and sets dotted keys of a Hydra configuration, and finds those that the user wrote.

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from hydra.plugins.config_source import ConfigSource

MODEL = "actor_rollout_ref.model"
CRITIC = "critic.model"
ROLLOUT = "actor_rollout_ref.rollout"
ACTOR = "actor_rollout_ref.actor"

VARIABLES = "ray_kwargs.ray_init.runtime_env.env_vars"
"""Environment variables of the run's processes."""

Get = Callable[[str], Any]
"""Value of a dotted key, None where it is absent or has no value yet."""


def get_value(config: DictConfig, key: str) -> Any:
    """Returns the value of ``key``; None if it is absent or still ``???``."""
    if OmegaConf.is_missing(_parent(config, key), key.rpartition(".")[2]):
        return None
    return OmegaConf.select(config, key)


def _parent(config: DictConfig, key: str) -> Any:
    parent = key.rpartition(".")[0]
    return (OmegaConf.select(config, parent) if parent else config) or OmegaConf.create()


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the dotted keys of a configuration and their values. Interpolations are not
    resolved."""
    if isinstance(node, DictConfig):
        node = OmegaConf.to_container(node, resolve=False)
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    out = {}
    for key, value in node.items():
        out |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def override_keys(overrides: list[str]) -> set[str]:
    """Returns the dotted keys of command line overrides: ``["+a.b=1", "~c"]`` gives ``{"a.b",
    "c"}``.
    """
    return {o.lstrip("+~").partition("=")[0] for o in overrides}


_VERL_SOURCE = "pkg://verl.trainer.config"
_STOCK_PACKAGES = ("verl", "qerl_verl.config", "hydra")
"""Whose files do not count as the user's. QeRL's own recipes do: they are recipes."""


def written_keys(config: DictConfig) -> set[str]:
    """Returns the dotted keys that the user wrote, on the command line or in a file that is neither
    verl's nor the switch's.

    A value that a recipe writes has to stay even if it equals verl's default, and the composed
    configuration does not tell the two apart. So the files of Hydra's defaults list are read again,
    each from its source. If a file has the name of one of verl's (a copy that the user has edited),
    the keys count whose values differ from verl's.

    Args:
        config: composed by Hydra, with the node ``hydra``, while Hydra is initialized.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    overrides = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
    keys = override_keys(list(config.hydra.overrides.task))
    sources = [_source(s.provider, f"{s.schema}://{s.path}") for s in config.hydra.runtime.config_sources]
    verl = _source("verl", _VERL_SOURCE)
    name = config.hydra.job.config_name
    defaults = GlobalHydra.instance().config_loader().compute_defaults_list(name, overrides, RunMode.RUN).defaults
    for entry in defaults:
        path = posixpath.normpath(entry.config_path or "")
        source = next((s for s in sources if s.scheme() != "structured" and s.is_config(path)), None)
        if source is None or path.startswith("hydra/") or _is_stock(source):
            continue
        stock = _values(verl, path, entry.package) if verl.is_config(path) else {}
        written = _values(source, path, entry.package)
        keys |= {key for key, value in written.items() if key not in stock or stock[key] != value}
    return keys


def _source(provider: str, path: str) -> ConfigSource:
    from hydra.core.plugins import Plugins
    from hydra.plugins.config_source import ConfigSource

    scheme = path.partition("://")[0]
    classes = {kind.scheme(): kind for kind in Plugins.instance().discover(ConfigSource)}
    return classes[scheme](provider, path)


def _is_stock(source: ConfigSource) -> bool:
    if source.scheme() == "pkg":
        return any(source.path == package or source.path.startswith(f"{package}.") for package in _STOCK_PACKAGES)
    verl = find_spec("verl")
    folders = [Path(f).resolve() for f in (verl and verl.submodule_search_locations) or ()]
    folders.append(Path(__file__).resolve().parent)
    return any(Path(source.path).resolve().is_relative_to(folder) for folder in folders)


def _values(source: ConfigSource, path: str, package: str | None) -> dict[str, Any]:
    """Returns the values that one file sets, by their dotted keys in the composed configuration; an
    empty group sets nothing.
    """
    content = OmegaConf.to_container(source.load_config(path).config, resolve=False)
    content = {key: value for key, value in content.items() if key not in ("defaults", "hydra")}
    return {key: value for key, value in flatten(content, package or "").items() if value != {}}


def is_written(key: str, keys: Collection[str]) -> bool:
    """Returns whether ``key``, or a group that it lies in, is among the keys that the user
    wrote."""
    return any(key == written or key.startswith(f"{written}.") for written in keys)
