"""Generates text from the declarations in :mod:`qerl_verl.config.settings`.

``python -m qerl_verl.config.generate`` rewrites, in a checkout of the repository,

- the ``qerl`` node of config/qerl_common.yaml: every setting with its default and a comment;
- the table of settings in docs/settings.md.

Both stand between two marker lines, and the rest of the files is written by hand. With ``--check``
nothing is written, and the exit code is 1 if a file is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import yaml

from qerl_verl.config.schema import Row, rows
from qerl_verl.config.settings import SETTINGS, QeRLSettings

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 100


def yaml_node() -> str:
    """Returns the ``qerl`` node with all defaults, and ``???`` where the choice of ``+qerl=``
    sets one."""
    out = ["qerl:"]
    for row in rows(QeRLSettings, "qerl"):
        indent = "  " * row.key.count(".")
        for comment in _comments(row):
            out += textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        name = row.key.rpartition(".")[2]
        if row.is_group:
            out.append(f"{indent}{name}:")
        else:
            value = "???" if row.setting.chosen_by_group else _literal(row.default)
            out.append(f"{indent}{name}: {value}")
    return "\n".join(out)


def markdown_table() -> str:
    """Returns the table of every setting that the user writes: key, default, allowed values and
    meaning.
    """
    out = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for row in SETTINGS.values():
        if not row.setting.chosen_by_group:
            out.append(f"| `{row.key}` | `{_literal(row.default)}` | {_values(row)} | {row.setting.text} |")
    return "\n".join(["", *out, ""])


PARTS: dict[str, tuple[str, str, Callable[[], str]]] = {
    "qerl_verl/config/qerl_common.yaml": ("# settings: begin", "# settings: end", yaml_node),
    "docs/settings.md": ("<!-- settings: begin", "<!-- settings: end", markdown_table),
}
"""File -> how its two marker lines begin, and what stands between them."""


def render(text: str, name: str) -> str:
    """Returns the content of a file with its generated part up to date.

    Args:
        text: the file's content now.
        name: its key in :data:`PARTS`.

    Raises:
        ValueError: the file has not exactly one pair of marker lines.
    """
    begin, end, make = PARTS[name]
    pattern = rf"(^{re.escape(begin)}[^\n]*\n).*?(^{re.escape(end)})"
    found = re.findall(pattern, text, re.M | re.S)
    if len(found) != 1:
        raise ValueError(f"{name}: expected one part between {begin!r} and {end!r}, found {len(found)}")
    return re.sub(pattern, lambda match: f"{match[1]}{make()}\n{match[2]}", text, flags=re.M | re.S)


def outdated(root: Path = ROOT) -> dict[Path, str]:
    """Returns file -> expected content for each file that is out of date."""
    out = {}
    for name in PARTS:
        text = (root / name).read_text(encoding="utf-8")
        if (new := render(text, name)) != text:
            out[root / name] = new
    return out


def _comments(row: Row) -> list[str]:
    """Returns the comment above a setting in the YAML file: its text and its allowed values."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"docs/\1", row.setting.text).replace("`", "")
    return [text, " | ".join(map(str, row.choices))] if row.choices else [text]


def _values(row: Row) -> str:
    if row.choices:
        return ", ".join(f"`{choice}`" for choice in row.choices)
    kind = {"bool": "true or false", "int": "integer", "float": "number", "str": "text"}
    names = [kind[name] for name in str(getattr(row.kind, "__name__", row.kind)).split(" | ") if name in kind]
    bounds = row.setting
    if bounds.at_least is not None:
        names.append(f"at least {bounds.at_least:g}")
    if bounds.above is not None:
        names.append(f"above {bounds.above:g}")
    if bounds.below is not None:
        names.append(f"below {bounds.below:g}")
    return ", ".join(names)


def _literal(value: object) -> str:
    """Returns a default as YAML has it."""
    return yaml.safe_dump(value).removesuffix("\n").removesuffix("\n...")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m qerl_verl.config.generate", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is out of date")
    check = parser.parse_args(arguments).check
    if not (ROOT / "docs").is_dir():
        print(f"{ROOT} is not a checkout of the repository: there is no docs folder", file=sys.stderr)
        return 2
    found = outdated()
    for file, text in found.items():
        print(f"{file}: {'out of date' if check else 'written'}")
        if not check:
            file.write_text(text, encoding="utf-8")
    return int(check and bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
