"""Implements ``qerl plan NAME [key=value ...]``, which estimates the memory of a run by part."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qerl_verl.cli.explain import ExplainError, compose_with_keys, split_words
from qerl_verl.nvfp4.errors import CheckpointError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qerl_verl.memory.estimate import Model, Run


def add_plan(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser(
        "plan",
        parents=[common],
        help="print what a run would take of GPU and host memory, by part, and what to change where it does not fit",
        usage="%(prog)s NAME [key=value ...] [--gpu-memory GIB] [--config-path PATH]",
    )
    parser.add_argument("words", nargs="*", metavar="NAME | key=value", help="as for `qerl explain`")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of one GPU (default: that of this machine's)")
    parser.add_argument("--config-path", help="folder or pkg://package of NAME (default: QeRL's recipes, then verl's)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    name, overrides = split_words(arguments.words, "plan")
    return show_plan(name, overrides, arguments.config_path, arguments.gpu_memory)


def show_plan(name: str, overrides: list[str], config_path: str | None, gpu_memory: float | None) -> int:
    """Prints the memory of a run on GPUs.

    Args:
        name, overrides, config_path: see :func:`~qerl_verl.cli.explain.compose_with_keys`.
        gpu_memory: GiB of one GPU; None reads this machine's.

    Returns:
        0, or 2 if the run does not fit.

    Raises:
        ExplainError: the configuration cannot be composed or run, or the model cannot be read.
    """
    from qerl_verl.config.keys import get_value
    from qerl_verl.config.rules import MODEL
    from qerl_verl.memory.estimate import GIB, estimate, propose

    config, model, run = read_run(name, overrides, config_path)
    total = int(_gpu_gib(gpu_memory) * GIB)
    found = estimate(model, run, total)

    print(f"{name}: {get_value(config, f'{MODEL}.path')} on GPUs of {total / GIB:.1f} GiB, estimated for one of them")
    for title, parts in (
        ("while the rollout generates", found.generating),
        ("at the peak of an update", found.training),
        ("in host memory, beside the processes themselves", found.host),
    ):
        print(f"\n{title}: {sum(parts.values()) / GIB:.1f} GiB")
        for part, size in parts.items():
            if size:
                print(f"  {size / GIB:7.2f}  {part}")
    fitting = found.cache_tokens // run.sequence
    print(
        f"\nKV cache: {found.cache_tokens} tokens, {fitting} sequences of {run.sequence}; the run asks for {run.sequences}"
    )
    print(f"micro-batch: {run.tokens} tokens, {found.kept_layers} of {model.layers} layers keep their outputs")
    if not found.problems:
        print("\nfits")
        return 0
    print("\ndoes not fit:")
    for problem in found.problems:
        print(f"  - {problem}")
    changes = propose(model, run, total)
    print("with these settings it does:" if changes else "no setting known here makes it fit")
    for change in changes or ():
        print(f"  {change}")
    return 2


def read_run(name: str, overrides: list[str], config_path: str | None) -> tuple[DictConfig, Model, Run]:
    """Returns a run's configuration after the rules of the switch, and what decides about its
    memory.

    Args:
        name, overrides, config_path: see :func:`~qerl_verl.cli.explain.compose_with_keys`.

    Raises:
        ExplainError: the configuration cannot be composed or run, or the model cannot be read.
    """
    from qerl_verl.config.arms import get_arm
    from qerl_verl.config.host import Host
    from qerl_verl.config.keys import get_value
    from qerl_verl.config.plan import plan
    from qerl_verl.config.rules import MODEL
    from qerl_verl.memory.read import model_of, read_config, run_of

    config, keys = compose_with_keys(name, overrides, config_path)
    made = plan(config, keys, Host.here(), "cuda", here=False)
    if made.problems:
        raise ExplainError(f"{name} cannot run: {'; '.join(made.problems)}")
    config = made.config
    if not get_arm(config).container:
        raise ExplainError(
            f"plan: the memory of +qerl={get_arm(config).name} cannot be estimated; that of nvfp4 and mxfp4 can"
        )
    try:
        content = read_config(config)
        targets, exclude = (get_value(config, f"{MODEL}.{key}") for key in ("target_modules", "exclude_modules"))
        model = model_of(content, get_value(config, f"{MODEL}.lora_rank"), targets, exclude)
    except (OSError, CheckpointError) as error:
        raise ExplainError(f"{MODEL}.path={get_value(config, f'{MODEL}.path')}: {error}") from error
    return config, model, run_of(config, made.shares_base)


def _gpu_gib(given: float | None) -> float:
    if given is not None:
        return given
    import torch

    if not torch.cuda.is_available():
        raise ExplainError("plan: this machine has no GPU; give the memory of one with --gpu-memory GIB")
    return torch.cuda.get_device_properties(0).total_memory / 2**30
