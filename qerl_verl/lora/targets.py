"""Finds the layers that an adapter has, from PEFT's ``target_modules`` and ``exclude_modules``."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from qerl_verl.lora.experts import is_of_experts, partial_problem

ALL_LINEAR = "all-linear"


def last_names(layers: Collection[str]) -> list[str]:
    """Returns the last parts of names, in the order of the layers."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def all_linear(layers: Collection[str]) -> list[str]:
    """Returns the meaning of ``all-linear``: the last names of all layers except those of
    experts."""
    return last_names([name for name in layers if not is_of_experts(name)])


def matched_layers(layers: Collection[str], targets: Any, exclude: Any = None, **config: Any) -> set[str]:
    """Returns the layers that PEFT gives an adapter (peft/tuners/tuners_utils.py,
    check_target_module_exists).

    Args:
        layers: full names.
        targets: ``all-linear``, a regular expression for full names, or a list of names or of their
            last parts.
        exclude: a regular expression or a list, like ``targets``.
        config: further fields of a LoraConfig that choose layers.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = all_linear(layers) if targets == ALL_LINEAR else targets
    settings = LoraConfig(target_modules=_plain(targets), exclude_modules=_plain(exclude), **config)
    return {name for name in layers if check_target_module_exists(settings, name)}


def without_tower(exclude: Any, tower: str) -> Any:
    """Returns ``exclude_modules`` extended by the vision tower.

    The layers of the tower may have the same last names as the decoder's. vLLM gives no adapter to
    a vision tower, so an adapter that was trained there would be lost in the rollout.

    Args:
        exclude: the user's ``exclude_modules``.
        tower: prefix of names in the vision tower; empty without a tower.
    """
    exclude = _plain(exclude)
    if not tower:
        return exclude
    pattern = rf".*\b{re.escape(tower.rstrip('.').rpartition('.')[2])}\..*"
    if not exclude:
        return pattern
    if isinstance(exclude, str) and exclude.endswith(pattern):
        return exclude
    if not isinstance(exclude, str):
        exclude = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, exclude))})"
    return f"{exclude}|{pattern}"


def find_problems(
    layers: Collection[str], targets: Any, exclude: Any = None, key: str = "", tower: Collection[str] = ()
) -> list[str]:
    """Returns the reasons why target modules are not what the user wrote, one sentence each.

    Args:
        layers: full names of the linear layers of the model's decoder. Only these can have an
            adapter.
        targets: see :func:`matched_layers`.
        exclude: see :func:`matched_layers`.
        key: prefix of the model's settings, with which each problem begins.
        tower: full names of linear layers of a vision tower, which has no adapter. Excluding them
            is not a mistake.
    """
    targets, exclude = _plain(targets), _plain(exclude)
    names = f"The model has {', '.join(last_names(layers))}"
    if not targets or not isinstance(targets, str | list) or not all(isinstance(t, str) for t in targets):
        return [f"{key}target_modules={targets}: no layer would have an adapter. {names}; give {ALL_LINEAR} or a list"]
    out = []
    try:
        if isinstance(targets, list):
            for target in targets:
                if not matched_layers(layers, [target]):
                    out.append(f"{key}target_modules: {target} is none of the linear layers. {names}; remove it")
        elif not matched_layers(layers, targets):
            out.append(
                f"{key}target_modules={targets}: a string is a regular expression for full names, "
                f"as {next(iter(layers))}, and this one matches none. {names}; for names give a "
                f"list, [{targets}]"
            )
        elif targets != ALL_LINEAR and (others := matched_layers(_other_modules(layers), targets)):
            out.append(
                f"{key}target_modules={targets}: the expression matches {sorted(others)[0]}, which "
                f"is no linear layer. {names}"
            )
        for excluded in [exclude] if isinstance(exclude, str) else exclude or []:
            whole = excluded if isinstance(exclude, str) else [excluded]
            if not matched_layers([*layers, *tower], whole):
                out.append(f"{key}exclude_modules: {excluded} matches no layer. {names}; remove it")
        if not out:
            out += _problems_of_matched(layers, targets, exclude, key)
    except Exception as error:  # re.error, or an error of PEFT
        out.append(f"{key}target_modules={targets}, exclude_modules={exclude}: {error}")
    return out


def _problems_of_matched(layers: Collection[str], targets: Any, exclude: Any, key: str) -> list[str]:
    matched = matched_layers(layers, targets, exclude)
    if not matched:
        return [f"{key}exclude_modules={exclude}: no layer is left that would have an adapter; remove it"]
    if isinstance(targets, str) and any(map(is_of_experts, matched)):
        names = ",".join(last_names([name for name in layers if name in matched]))
        return [
            f"{key}target_modules={targets}: PEFT and vLLM load an adapter on the experts by the "
            f"names of its layers, not by an expression; give a list, [{names}]"
        ]
    problem = partial_problem(layers, matched)
    return [f"{key}target_modules={targets}, exclude_modules={exclude}: {problem}"] if problem else []


def _other_modules(layers: Collection[str]) -> set[str]:
    """Returns names of a decoder's modules that are not linear layers, to detect a wide pattern."""
    parents = {name.rsplit(".", depth)[0] for name in layers for depth in range(1, name.count(".") + 1)}
    return parents | {"lm_head", "model.embed_tokens", "model.norm", "score"}


def _plain(value: Any) -> Any:
    """Converts OmegaConf's classes, sets and tuples to plain lists."""
    return value if isinstance(value, str) or not isinstance(value, Collection) else list(value)
