"""Adapters that a run starts from (``lora_adapter_path``): what is taken from them, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config.rules import CRITIC, MODEL
from qerl_verl.config.settings import SettingsError

_STOCK = {"lora_rank": 0, "lora_alpha": 16, "target_modules": "all-linear"}
"""verl's values of what an adapter brings with it."""


def adopt_adapter(config: DictConfig, keys: set[str], model: str = MODEL) -> dict | None:
    """Take rank and alpha from the adapter that training goes on from; verl and vLLM size their buffers by the setting.

    Args:
        model: key of the model, actor's or critic's.

    Returns:
        The content of adapter_config.json and, under ``wanted``, what the user set; None where there is no adapter to read.

    Raises:
        SettingsError: no adapter there, or one of another rank or alpha than the user set.
    """
    path = OmegaConf.select(config, f"{model}.lora_adapter_path")
    if path is None or "://" in path:
        return None
    file = os.path.join(os.path.expanduser(path), "adapter_config.json")
    if not os.path.exists(file):
        raise SettingsError(
            [f"{model}.lora_adapter_path={path}: no adapter_config.json there; give a PEFT adapter's folder"]
        )
    with open(file) as handle:
        adapter = json.load(handle)
    wanted = {}
    for name, stock in _STOCK.items():
        value = OmegaConf.select(config, f"{model}.{name}")
        if f"{model}.{name}" in keys or value not in (stock, None):
            wanted[name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    for name, found in (("lora_rank", adapter["r"]), ("lora_alpha", adapter["lora_alpha"])):
        if wanted.get(name, found) != found:
            raise SettingsError(
                [
                    f"{model}.{name}={wanted[name]}, but the adapter {path} has {found}; remove the setting, or set {found}"
                ]
            )
        OmegaConf.update(config, f"{model}.{name}", found)
    return {**adapter, "wanted": wanted}


def adapter_problems(config: DictConfig, model: str, adapter: dict, base: Path | None = None) -> list[str]:
    """What keeps an adapter from going on on the resolved base: other layers, other shapes, more than LoRA tensors."""
    from safetensors import safe_open

    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.checkpoint import read_config, read_headers

    folder = OmegaConf.select(config, f"{model}.lora_adapter_path")
    base = base or Path(OmegaConf.select(config, f"{model}.path"))
    where, out = f"{model}.lora_adapter_path={folder}", []
    headers = {name: tuple(info.shape) for name, info in read_headers(base).items()}
    layers = {
        n.removesuffix(".weight_packed"): (s[0], 2 * s[1]) for n, s in headers.items() if n.endswith(".weight_packed")
    }
    if not layers:  # the base is used as it is
        linears = tuple(f".{name}.weight" for name in get_architecture(read_config(base)).linears)
        layers = {n.removesuffix(".weight"): s for n, s in headers.items() if n.endswith(linears)}

    heads = {"classifier", "score"} if model == CRITIC else set()  # what PEFT saves of a token classification model
    extra = ["modules_to_save"] if set(adapter.get("modules_to_save") or ()) - heads else []
    extra += [key for key in ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern") if adapter.get(key)]
    extra += ["bias"] if adapter.get("bias", "none") != "none" else []
    if extra:
        out.append(
            f"{where}: {extra[0]}={adapter[extra[0]]} in its adapter_config.json; plain LoRA tensors alone, of one rank, and a critic's head, can go on"
        )

    found, wanted = adapter.get("target_modules"), adapter["wanted"].get("target_modules")
    if wanted == "all-linear":
        wanted = sorted({name.rpartition(".")[2] for name in layers})
    as_set = lambda names: {names} if isinstance(names, str) else set(names or ())  # noqa: E731
    if wanted is not None and as_set(wanted) != as_set(found):
        out.append(
            f"{model}.target_modules={adapter['wanted']['target_modules']}, but the adapter {folder} has "
            f"{found if isinstance(found, str) else sorted(found)}; remove the setting"
        )

    file = os.path.join(os.path.expanduser(folder), "adapter_model.safetensors")
    if not os.path.exists(file):
        return out
    trained_on = (
        f"the adapter was trained on {adapter.get('base_model_name_or_path')}, not on {config.qerl.source_model}"
    )
    with safe_open(file, framework="pt") as tensors:
        if model == CRITIC and "base_model.model.score.weight" not in tensors.keys():
            return [
                *out,
                f"{where}: no value head in it; give the adapter of a critic (global_step_N/critic/lora_adapter)",
            ]
        for name in tensors.keys():
            layer, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
            if part not in ("A.weight", "B.weight"):
                continue
            rows, columns = tensors.get_slice(name).get_shape()
            expected = layers.get(layer) or headers.get(f"{layer}.weight")
            if expected is None:
                return [*out, f"{where}: {trained_on}: the model has no layer {layer}"]
            size, needed = (columns, expected[1]) if part == "A.weight" else (rows, expected[0])
            if size != needed:
                return [*out, f"{where}: {trained_on}: {name} has {size} where the model needs {needed}"]
    return out
