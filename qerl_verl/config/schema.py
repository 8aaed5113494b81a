"""Settings as fields of frozen dataclasses: how one is declared, listed, and reads from a mapping.

A field's annotation is the setting's type, with :data:`typing.Literal` for a choice. Its default
and a :class:`Setting` say the rest. The checks, the YAML file and the documentation are derived
from these declarations (:mod:`qerl_verl.config.generate`).

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class SettingsError(ValueError):
    """A combination of settings that cannot run.

    Attributes:
        problems: one sentence each, with the key and the fix.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class Setting:
    """What is known about a setting besides its name, type and default.

    Attributes:
        text: what it does, in Markdown. The documentation and the YAML comments print it.
        at_least: lowest value, inclusive.
        above: lower bound, exclusive.
        below: upper bound, exclusive.
        advice: appended to the message for a value that is not allowed.
        scope: the runs that it concerns: ``any``; ``packed``, those whose base is stored in the
            NVFP4 container; or ``quantization``, those that quantize a model to NVFP4.
        defines_policy: recorded in a checkpoint and compared when a run resumes, because another
            value makes another policy.
        chosen_by_group: set by the choice of the Hydra group's file, so that the YAML file with
            the defaults has no value for it.
    """

    text: str
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    advice: str = ""
    scope: Literal["any", "packed", "quantization"] = "any"
    defines_policy: bool = False
    chosen_by_group: bool = False


def setting(default: Any, text: str, **more: Any) -> Any:
    """Declares a field of a settings class.

    Args:
        default: its default.
        text: see :class:`Setting`.
        more: further attributes of :class:`Setting`.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(text, **more)})


def group(cls: type[T], text: str) -> T:
    """Declares a field that holds a group of settings.

    Args:
        cls: the group's class.
        text: what the group is for, in Markdown.
    """
    return dataclasses.field(default_factory=cls, metadata={"setting": Setting(text)})


@dataclass(frozen=True)
class Row:
    """One entry of the table that a settings class stands for.

    Attributes:
        key: dotted key, e.g. ``qerl.aqn.seed``.
        kind: the type; a dataclass for a group.
        default: the default; an instance for a group.
        setting: what else is known about it.
    """

    key: str
    kind: Any
    default: Any
    setting: Setting

    @property
    def is_group(self) -> bool:
        return dataclasses.is_dataclass(self.kind)

    @property
    def choices(self) -> tuple[Any, ...]:
        """The allowed values; empty if only the type restricts them."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()


def rows(cls: type, prefix: str) -> Iterator[Row]:
    """Yields the settings and groups of a settings class, in the order of their declaration.

    Args:
        prefix: the key of ``cls`` itself, e.g. ``qerl``.
    """
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, key = kinds[field.name], f"{prefix}.{field.name}"
        group = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        yield Row(key, kind, kind() if group else field.default, field.metadata["setting"])
        if group:
            yield from rows(kind, key)


def build(cls: type[T], values: Any, prefix: str, problems: list[str], root: type | None = None) -> T:
    """Returns an instance of a settings class from a mapping, with the default in place of each
    value that has a problem.

    Args:
        values: the content of the node, nested like the classes.
        prefix: its dotted key, for messages.
        problems: gets one sentence for each unknown key, wrong type, and value that is not allowed.
        root: the class of the outermost group, whose keys are suggested for a misspelt one.
    """
    if not isinstance(values, Mapping):
        kind = type(values).__name__
        problems.append(f"{prefix}={values!r}: expected a group of settings, got {kind}")
        return cls()
    root, top = root or cls, prefix.partition(".")[0]
    table = {row.key: row for row in rows(cls, prefix)}
    arguments = {}
    for name, value in values.items():
        row = table.get(f"{prefix}.{name}")
        if row is None:
            problems.append(_unknown(f"{prefix}.{name}", prefix, root, top))
        elif row.is_group:
            arguments[name] = build(row.kind, value, row.key, problems, root)
        elif problem := _value_problem(row, value):
            problems.append(problem)
        else:
            arguments[name] = float(value) if _is_float(row.kind) and value is not None else value
    return cls(**arguments)


def _unknown(key: str, prefix: str, root: type, top: str) -> str:
    every = [row.key for row in rows(root, top)]
    own = [k.removeprefix(f"{prefix}.") for k in every if k.rpartition(".")[0] == prefix]
    name = key.rpartition(".")[2]
    near = [f"{prefix}.{n}" for n in difflib.get_close_matches(name, own, n=1)]
    near += [k for k in every if k.rpartition(".")[2] == name]
    near += difflib.get_close_matches(key, [k for k in every if k != prefix], n=1, cutoff=0.75)
    guess = f" did you mean {near[0]}?" if near else ""
    return f"{key}: no such setting;{guess} known under {prefix}: {', '.join(own)}"


def _value_problem(row: Row, value: Any) -> str | None:
    """Returns why a value is not allowed, or None."""
    where, advice = f"{row.key}={value}", row.setting.advice
    if choices := row.choices:
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return None
        return f"{where}: choose one of {', '.join(map(str, choices))}{advice and f', {advice}'}"
    allowed = _types(row.kind)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        return f"{row.key}={value!r}: expected {_name(row.kind)}, got {type(value).__name__}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    bounds = row.setting
    limits = [
        (words, bound, fits)
        for words, bound, fits in (
            ("at least", bounds.at_least, operator.ge),
            ("above", bounds.above, operator.gt),
            ("below", bounds.below, operator.lt),
        )
        if bound is not None
    ]
    if math.isfinite(value) and all(fits(value, bound) for _, bound, fits in limits):
        return None
    wanted = [f"{words} {bound:g}" for words, bound, _ in limits]
    if not math.isfinite(value):
        wanted.append("finite")
    return f"{where}: must be {' and '.join(wanted)}{advice and f'; {advice}'}"


def _types(kind: Any) -> tuple[type, ...]:
    members = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return (*members, int) if float in members else members


def _is_float(kind: Any) -> bool:
    return float in _types(kind)


def _name(kind: Any) -> str:
    return str(kind) if isinstance(kind, types.UnionType) else kind.__name__
