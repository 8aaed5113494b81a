"""Implements ``qerl explain NAME [key=value ...]``, which prints the configuration that a run would
have and starts nothing.

Composes a recipe as verl's ``main_ppo`` would and applies the rules of the switch. Nothing is
downloaded, quantized or written, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from omegaconf import DictConfig, open_dict

from qerl_verl.config.keys import flatten, written_keys

RECIPES = "pkg://qerl_verl.recipes"
VERL = "pkg://verl.trainer.config"
STOCK = "ppo_trainer"
T = TypeVar("T")


class ExplainError(ValueError):
    """The configuration cannot be composed."""


def add_explain(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser(
        "explain",
        parents=[common],
        help="print what a recipe and the switch set in verl's configuration, and what cannot run; starts nothing",
        usage="%(prog)s NAME [key=value ...] [--config-path PATH] [--platform {cuda,cpu}] [--elsewhere]",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="NAME | key=value",
        help="a recipe, as in --config-name, or ppo_trainer with +qerl=nvfp4 among the overrides; and overrides as on "
        "verl's command line, in any order",
    )
    parser.add_argument("--config-path", help="folder or pkg://package of NAME (default: QeRL's recipes, then verl's)")
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument(
        "--elsewhere",
        action="store_true",
        help="the run takes place on another machine: do not look at this one's files, CPUs, GPUs and Ray",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    name, overrides = split_words(arguments.words, "explain")
    return explain(name, overrides, arguments.config_path, arguments.platform, not arguments.elsewhere)


def split_words(words: list[str], command: str) -> tuple[str, list[str]]:
    """Returns the recipe's name among the words of a command line, and the overrides.

    Raises:
        ExplainError: no word is a name.
    """
    names = [word for word in words if "=" not in word and not word.startswith("~")]
    if not names:
        raise ExplainError(f"{command}: give the name of a recipe, for example `qerl {command} gsm8k_grpo`")
    at = words.index(names[0])
    return names[0], words[:at] + words[at + 1 :]


def compose(name: str, overrides: list[str], config_path: str | None = None) -> DictConfig:
    """Returns the composed configuration, see :func:`compose_with_keys`."""
    return _compose(name, overrides, config_path, lambda config: None)[0]


def compose_with_keys(name: str, overrides: list[str], config_path: str | None = None) -> tuple[DictConfig, set[str]]:
    """Returns the composed configuration, and the dotted keys in it that the user wrote.

    Args:
        name, overrides, config_path: as for :func:`_compose`.

    Raises:
        ExplainError: no such recipe, or Hydra refuses it.
    """
    return _compose(name, overrides, config_path, written_keys)


def _compose(
    name: str, overrides: list[str], config_path: str | None, ask: Callable[[DictConfig], T]
) -> tuple[DictConfig, T]:
    """Returns the composed configuration, and what ``ask`` says about it while it still has Hydra's
    own node.

    Args:
        name: a recipe, as in ``--config-name``.
        overrides: as on verl's command line.
        config_path: folder, or ``pkg://package``, in which the recipe lies; None looks in QeRL's
            recipes and then among verl's own configurations.

    Raises:
        ExplainError: no such recipe, or Hydra refuses it.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    from qerl_verl.plugin import register_search_path

    register_search_path()
    path = config_path or (RECIPES if _is_recipe(name) else VERL)
    if path.startswith("pkg://"):
        context = hydra.initialize_config_module(path.removeprefix("pkg://"), version_base=None)
    else:
        folder = Path(path).expanduser().absolute()
        if not folder.is_dir():
            raise ExplainError(f"--config-path {path}: there is no such folder")
        context = hydra.initialize_config_dir(str(folder), version_base=None)
    try:
        with context:
            config = hydra.compose(name.removesuffix(".yaml"), overrides=overrides, return_hydra_config=True)
            answer = ask(config)
        with open_dict(config):
            del config["hydra"]
        return config, answer
    except MissingConfigException as error:
        if error.missing_cfg_file != name.removesuffix(".yaml"):
            raise ExplainError(f"{name}: {error}{_missing_folder(str(error))}") from error
        fix = "" if config_path else f" QeRL's: {_some_recipes()}. Give --config-path for one of yours."
        raise ExplainError(f"{name}: there is no such recipe in {path}.{fix}") from error
    except (HydraException, OmegaConfBaseException) as error:
        cause = f": {error.__cause__}" if error.__cause__ else ""
        stock = [word for word in overrides if not word.lstrip("+~").startswith("qerl")]
        verls = stock != overrides and not _is_recipe(name) and not _composes(name, stock, config_path)
        also = f" (verl {version('verl')} refuses it without QeRL's settings, too)" if verls else ""
        raise ExplainError(f"{name}: {error}{cause}{also}") from error
    finally:
        GlobalHydra.instance().clear()


def _missing_folder(message: str) -> str:
    """Returns a sentence on a relative folder of ``hydra.searchpath`` in Hydra's ``message`` that
    is not below the working directory; empty if there is none."""
    for folder in re.findall(r"path=file://([^/\s]\S*)", message):
        if not Path(folder).is_dir():
            return f" (hydra.searchpath of the recipe names {folder}, which is not in {Path.cwd()}: start where it is)"
    return ""


def _composes(name: str, overrides: list[str], config_path: str | None = None) -> bool:
    try:
        compose(name, overrides, config_path)
    except ExplainError:
        return False
    return True


def _some_recipes() -> str:
    """Returns the names of QeRL's recipes for a message, a folder of them as ``FOLDER/...``."""
    names = [name if "/" not in name else f"{name.partition('/')[0]}/..." for name in recipes()]
    return ", ".join(dict.fromkeys(names))


def recipes() -> list[str]:
    """Yields the names of the recipes that come with QeRL, those of a subfolder as
    ``FOLDER/NAME``."""
    from importlib.resources import files

    def names(folder, prefix: str = "") -> Iterator[str]:
        for entry in folder.iterdir():
            if entry.is_dir():
                yield from names(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml") and "\ndefaults:" in entry.read_text(encoding="utf-8"):
                yield prefix + entry.name.removesuffix(".yaml")

    return sorted(names(files("qerl_verl.recipes")))


def _is_recipe(name: str) -> bool:
    return name.removesuffix(".yaml") in recipes()


def explain(
    name: str, overrides: list[str], config_path: str | None = None, platform: str = "cuda", here: bool = True
) -> int:
    """Prints what the recipe sets, what the switch sets and what cannot run; exit code 2 if
    something cannot.

    Args:
        name, overrides, config_path: as for :func:`compose_with_keys`.
        platform: ``cuda`` or ``cpu``.
        here: as for :func:`~qerl_verl.config.plan.plan`.

    Raises:
        ExplainError: the configuration cannot be composed.
    """
    from omegaconf.errors import OmegaConfBaseException

    from qerl_verl.config.host import Host
    from qerl_verl.config.plan import Plan, plan

    stock = compose(STOCK, [], VERL)
    config, keys = compose_with_keys(name, overrides, config_path)
    before, composed = flatten(stock), flatten(config)
    changed = {k: v for k, v in composed.items() if not k.startswith("qerl.") and before.get(k, _ABSENT) != v}
    print(f"{name} on {platform}\n\nset by the recipe and the command line (verl's {STOCK} -> here):")
    for key, value in changed.items():
        print(f"  {key}: {before[key]} -> {value}" if key in before else f"  {key}: {value}")

    if without_value := [k for k, v in composed.items() if v == "???" and before.get(k) != v]:
        made = Plan(problems=[f"{key}: no value yet; add {key}=..." for key in without_value])
    else:
        try:
            made = plan(config, keys, Host.here(), platform, here)
        except OmegaConfBaseException as error:
            made = Plan(problems=[str(error).splitlines()[0]])
    print("\nset by the switch:")
    for line in made.lines or ["nothing"]:
        print(f"  {line}")
    if "qerl" in config:
        print("\nthe switch's own settings:")
        for key, value in flatten(config.qerl, "qerl").items():
            print(f"  {key}: {value}")
    for line in made.unseen:
        print(f"\nnot looked at: {line}")
    print(f"\nproblems: {'none' if not made.problems else ''}".rstrip())
    for problem in made.problems:
        print(f"  - {problem}")
    return 2 if made.problems else 0


_ABSENT = object()
