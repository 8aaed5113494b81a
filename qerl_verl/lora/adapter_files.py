"""Reads adapters in PEFT's format and checks them against a model.

PEFT loads what fits and warns about the rest (peft/peft_model.py, load_adapter), so training could
continue from an adapter of which only a part, or nothing, was loaded. Here every tensor of the file
must have a place in the model and every place a tensor; otherwise the adapter is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from qerl_verl.lora.experts import is_of_experts, partial_problem
from qerl_verl.lora.targets import matched_layers

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
"""Prefix of the tensor names in PEFT's adapter files."""

_TENSOR = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight$")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
"""Parts of names that torch.compile, FSDP, activation checkpointing and DDP insert."""

_CHOICES = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("r", "lora_alpha", "use_rslora", "lora_dropout", "init_lora_weights", "eva_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Fields of a LoraConfig that may differ from PEFT's default, or that have checks of their own."""

_HARMLESS_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it is. The others (pissa, olora, corda,
loftq, lora_ga) move a part of the base's weight into the adapter, which then belongs to that base.
"""


class AdapterError(ValueError):
    """An adapter cannot be used. ``problems`` lists the reasons, one sentence each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


def read_adapter_config(folder: str | Path, heads: Collection[str] = ()) -> dict[str, Any]:
    """Returns the content of ``adapter_config.json``.

    Args:
        folder: the adapter's folder.
        heads: modules that a critic trains beside LoRA, which may be in ``modules_to_save``.

    Raises:
        AdapterError: the file is missing or not readable, or the adapter is not plain LoRA, see
            :func:`find_unsupported`.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise AdapterError([f"no {CONFIG_FILE} there; give the local folder of a PEFT adapter"])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError([f"{CONFIG_FILE} is not valid JSON ({error})"]) from None
    if not isinstance(config, dict):
        raise AdapterError([f"{CONFIG_FILE} is not a JSON object"])
    if problems := find_unsupported(config, heads):
        raise AdapterError(problems)
    return config


def find_unsupported(config: Mapping[str, Any], heads: Collection[str] = ()) -> list[str]:
    """Returns the features of an adapter beyond LoRA and rsLoRA with one rank, a sentence each.

    Every key that is not a field of this PEFT's LoraConfig, or whose value differs from the
    default, is named, so that a feature of a newer PEFT is not lost.

    Args:
        config: the content of ``adapter_config.json``.
        heads: see :func:`read_adapter_config`.
    """
    from peft import LoraConfig

    if config.get("peft_type", "LORA") != "LORA":
        return [f"peft_type={config['peft_type']} in its {CONFIG_FILE}; LORA alone can go on"]
    out = []
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank <= 0:
        out.append(f"r={rank} in its {CONFIG_FILE}; it has to be a positive whole number")
    if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        out.append(
            f"lora_alpha={alpha} in its {CONFIG_FILE}: the LoRA delta would be multiplied by that, "
            "so that nothing trains (verl's model merger writes 0 where it does not find the "
            "value). Write the value that the adapter was trained with into that file"
        )
    default = LoraConfig()
    defaults = {f.name: getattr(default, f.name) for f in fields(LoraConfig)}
    for name, value in config.items():
        if name == "modules_to_save" and set(value or ()) <= set(heads):
            continue
        if name not in _CHOICES and value and value != defaults.get(name):
            out.append(
                f"{name}={value} in its {CONFIG_FILE}; plain LoRA tensors alone, of one rank, and a critic's head, can go on"
            )
    if (init := config.get("init_lora_weights")) not in _HARMLESS_INITIALIZATIONS:
        out.append(
            f"init_lora_weights={init} in its {CONFIG_FILE}: the adapter belongs to a base whose "
            "weights this initialization changed; convert it to plain LoRA (PEFT's "
            "save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if not config.get("target_modules"):
        out.append(f"no target_modules in its {CONFIG_FILE}; write the names of the layers that it adapts there")
    return out


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of an adapter on the CPU, keyed by their names in the file.

    Raises:
        AdapterError: the file is missing or damaged, or a value is not finite.
    """
    from peft import load_peft_weights

    files = ("adapter_model.safetensors", "adapter_model.bin")
    if not any((Path(folder) / name).is_file() for name in files):
        raise AdapterError([f"neither {' nor '.join(files)} is there"])
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # raised by safetensors, pickle or torch
        raise AdapterError([f"its tensors cannot be read ({error}); save or fetch the adapter again"]) from None
    bad = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if bad:
        raise AdapterError(
            [f"{len(bad)} of its {len(tensors)} tensors hold NaN or Inf: {_some(bad)}; take an earlier checkpoint"]
        )
    return tensors


def map_names(
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    layers: Mapping[str, tuple[int, int]],
    head: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, str]:
    """Finds the place in a model for every tensor of an adapter's file.

    Names may lack PEFT's prefix, may contain an adapter's name (``lora_A.default.weight``), and may
    have been saved from a compiled or wrapped model.

    Args:
        shapes: name -> shape of the tensors in the file.
        config: see :func:`read_adapter_config`.
        layers: full name -> (output features, input features) of every linear layer of the model's
            decoder.
        head: name -> shape of the tensors of a critic's value head, ``score.weight``.

    Returns:
        Name in the file -> PEFT's name.

    Raises:
        AdapterError: tensors have no place or another shape, or places have no tensor, with the
            counts.
    """
    rank, head = config["r"], head or {}
    settings = {name: config.get(name) for name in ("layers_to_transform", "layers_pattern")}
    adapted = matched_layers(layers, config["target_modules"], config.get("exclude_modules"), **settings)
    if problem := partial_problem(layers, adapted):
        raise AdapterError([f"its {CONFIG_FILE}: {problem}"])
    if config.get("use_rslora") and any(map(is_of_experts, adapted)):
        raise AdapterError([
            f"use_rslora in its {CONFIG_FILE}: on experts PEFT scales such an adapter by another "
            "rank than it was trained with, because it joins gate_proj and up_proj; plain LoRA "
            "alone can go on"
        ])  # fmt: skip
    wanted = {f"{PREFIX}{name}": shape for name, shape in head.items()}
    for name in adapted:
        rows, columns = layers[name]
        wanted |= {f"{PREFIX}{name}.lora_A.weight": (rank, columns), f"{PREFIX}{name}.lora_B.weight": (rows, rank)}

    places = {name: _peft_name(name, layers, head) for name in shapes}
    if not any(_TENSOR.match(name) for name in shapes):
        raise AdapterError([f"none of the {len(shapes)} tensors of its file is a LoRA tensor (lora_A, lora_B)"])
    out = []
    unused = [name for name, place in places.items() if place not in wanted]
    if unused:
        text = f"{len(unused)} of its {len(shapes)} tensors have no place in the model: {_some(unused)}"
        other = [name for name in unused if places[name] is not None]
        targets = (
            config["target_modules"] if isinstance(config["target_modules"], str) else sorted(config["target_modules"])
        )
        out.append(f"{text}. Its {CONFIG_FILE} says target_modules={targets}" if other else text)
    if missing := sorted(wanted.keys() - set(places.values())):
        lora = [name for name in missing if ".lora_" in name]
        if len(lora) < len(missing):
            out.append("no value head in it; give the adapter of a critic (global_step_N/critic/lora_adapter)")
        if lora:
            out.append(
                f"{len(lora)} of the {len(wanted) - len(head)} LoRA tensors that its {CONFIG_FILE} "
                f"promises are not in its file: {_some(lora)}"
            )
    if len(set(places.values())) < len(places) and not unused:
        out.append(f"two of its {len(shapes)} tensors have the same place in the model")
    for name, shape in shapes.items():
        place = places[name]
        if place in wanted and tuple(shape) != wanted[place]:
            out.append(f"{name} has shape {list(shape)} where the model and r={rank} need {list(wanted[place])}")
            break
    if out:
        raise AdapterError(out)
    return {name: place for name, place in places.items() if place is not None}


def check_loaded(loaded: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Compares the adapter in a model with the tensors that were read.

    Args:
        loaded: the result of ``peft.get_peft_model_state_dict``. Tensors on the meta device are
            skipped.
        expected: PEFT's name -> tensor.

    Raises:
        AdapterError: names or values differ, with the counts.
    """
    different = [
        name
        for name, tensor in loaded.items()
        if name in expected and not tensor.is_meta and not torch.equal(tensor, expected[name].to(tensor.dtype))
    ]
    lacking, surplus = expected.keys() - loaded.keys(), loaded.keys() - expected.keys()
    if different or lacking or surplus:
        raise AdapterError([
            f"PEFT took {len(expected) - len(lacking) - len(different)} of its {len(expected)} "
            f"tensors; not taken: {_some([*lacking, *different])}; without one in the file: "
            f"{_some(surplus)}"
        ])  # fmt: skip


def _peft_name(name: str, layers: Collection[str], head: Collection[str]) -> str | None:
    """Returns PEFT's name of a tensor, or None where the model has no layer for it."""
    plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix(PREFIX)
    match = _TENSOR.match(plain)
    if match is None:
        plain = re.sub(r"\.modules_to_save(?:\.[^.]+)?\.(weight|bias)$", r".\1", plain)
        return f"{PREFIX}{plain}" if plain in head else None
    for layer in (match["module"], f"model.{match['module']}", match["module"].removeprefix("model.")):
        if layer in layers:
            return f"{PREFIX}{layer}.lora_{match['part']}.weight"
    return None


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
