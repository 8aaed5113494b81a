"""Reads and checks the adapters that a run starts from (``lora_adapter_path``), and the layers of a
new adapter (``target_modules``)."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config.draft import Draft
from qerl_verl.config.rules import CRITIC, MODEL
from qerl_verl.config.settings import SettingsError

_STOCK = {"lora_rank": 0, "lora_alpha": 16, "target_modules": "all-linear", "exclude_modules": None}
"""verl's values of what an adapter brings with it."""

_SAVED_HEADS = ("classifier", "score")
"""What PEFT names ``modules_to_save`` of a token classification model, as which a critic is
built."""


def adopt_adapter(draft: Draft, keys: Collection[str], model: str = MODEL) -> dict | None:
    """Sets rank and alpha to those of the adapter that the run starts from, since they size verl's
    and vLLM's buffers.

    The path becomes absolute: the processes of a run have other working folders, and verl accepts
    neither ``~`` nor a slash at the end (verl/utils/fs.py, copy_local_path_from_hdfs).

    Args:
        draft: the run's configuration.
        keys: dotted keys that the user wrote.
        model: key of the model, actor's or critic's.

    Returns:
        The content of adapter_config.json and, under ``wanted``, what the user set; None if there
        is no adapter to read.

    Raises:
        SettingsError: the folder has no adapter, one that is not plain LoRA, or one of another rank
            or alpha than the user set.
    """
    from qerl_verl.lora.adapter_files import AdapterError, read_adapter_config

    given = draft.get(f"{model}.lora_adapter_path")
    if given is None or "://" in given:
        return None
    path = os.path.abspath(os.path.expanduser(given))
    where = f"{model}.lora_adapter_path={given}"
    try:
        adapter = read_adapter_config(path, _SAVED_HEADS if model == CRITIC else ())
    except AdapterError as error:
        raise SettingsError([f"{where}: {problem}" for problem in error.problems]) from None
    draft.set(f"{model}.lora_adapter_path", path, "processes have other working folders")
    wanted = {}
    for name, stock in _STOCK.items():
        value = draft.get(f"{model}.{name}")
        if f"{model}.{name}" in keys or value not in (stock, None):
            wanted[name] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    problems = []
    for name, found in (("lora_rank", adapter["r"]), ("lora_alpha", adapter["lora_alpha"])):
        if wanted.get(name, found) != found:
            problems.append(
                f"{model}.{name}={wanted[name]}, but the adapter {given} has {found}; remove the "
                f"setting, or set {found}"
            )
        draft.set(f"{model}.{name}", found, "that of the adapter that training goes on from")
    if problems:
        raise SettingsError(problems)
    return {**adapter, "wanted": wanted}


def adapter_problems(config: DictConfig, model: str, adapter: dict) -> list[str]:
    """Returns why a run cannot start from an adapter: other layers or shapes, tensors without a
    layer in the model, or missing tensors.

    Args:
        config: ``{model}.path`` is a local folder, quantized or not.
        model: key of the model.
        adapter: the result of :func:`adopt_adapter`.
    """
    from qerl_verl.lora.adapter_files import AdapterError, map_names, read_tensors
    from qerl_verl.lora.targets import matched_layers
    from qerl_verl.nvfp4.model_shapes import adaptable_shapes

    get = lambda name: OmegaConf.select(config, f"{model}.{name}")  # noqa: E731
    folder, base = get("lora_adapter_path"), Path(os.path.expanduser(get("path")))
    layers, out = adaptable_shapes(base), []
    where = f"{model}.lora_adapter_path={folder}"
    wanted = adapter["wanted"]
    if "target_modules" in wanted or "exclude_modules" in wanted:
        targets, exclude = (
            wanted.get("target_modules", _STOCK["target_modules"]),
            wanted.get("exclude_modules"),
        )
        problems = _target_problems(base, layers, targets, exclude, model)
        if problems:
            return problems
        if matched_layers(layers, targets, exclude) != adapted_layers(config, model, layers, adapter):
            found = adapter["target_modules"]
            name = "target_modules" if "target_modules" in wanted else "exclude_modules"
            out.append(
                f"{model}.{name}={wanted[name]}, but the adapter {folder} has "
                f"{found if isinstance(found, str) else sorted(found)}; remove the setting"
            )
    head = value_head_shapes(base) if model == CRITIC else None
    try:
        map_names(
            {name: tuple(t.shape) for name, t in read_tensors(folder).items()},
            adapter,
            layers,
            head,
        )
    except AdapterError as error:
        trained_on = adapter.get("base_model_name_or_path")
        source = OmegaConf.select(config, f"qerl.source_models.{'critic' if model == CRITIC else 'actor'}")
        other = f" (the adapter was trained on {trained_on}, not on {source or base})" if trained_on else ""
        out += [f"{where}: {problem}{other}" for problem in error.problems]
    return out or _experts_in_16_bits(config, adapted_layers(config, model, layers, adapter), model)


def target_problems(config: DictConfig, model: str) -> list[str]:
    """Returns why the layers that the user named cannot have a new adapter.

    Args:
        config: ``{model}.path`` is a local folder, quantized or not.
        model: key of the model.
    """
    from qerl_verl.nvfp4.model_shapes import adaptable_shapes

    get = lambda name: OmegaConf.select(config, f"{model}.{name}")  # noqa: E731
    base = Path(os.path.expanduser(get("path")))
    layers = adaptable_shapes(base)
    problems = _target_problems(base, layers, get("target_modules"), get("exclude_modules"), model)
    return problems or _experts_in_16_bits(config, adapted_layers(config, model, layers, None), model)


def _experts_in_16_bits(config: DictConfig, adapted: Collection[str], model: str) -> list[str]:
    """Returns the problem of an adapter on experts whose base stays in 16 bits in the run's arm."""
    from qerl_verl.config.arms import get_arm
    from qerl_verl.lora.experts import is_of_experts

    if get_arm(config).container or not any(map(is_of_experts, adapted)):
        return []
    return [
        f"{model}.target_modules: the arm {get_arm(config).name} has no adapter on the experts, "
        "because PEFT 0.21 trains one that vLLM does not load by its names "
        "(experts.base_layer.lora_A); take gate_proj, up_proj and down_proj out, or use "
        "+qerl=nvfp4"
    ]


def value_head_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of the tensors of a critic's value head (engine/nvfp4_critic.py,
    NVFP4EngineWithValueHead).
    """
    from transformers import AutoConfig

    hidden = AutoConfig.from_pretrained(base).get_text_config().hidden_size
    return {"score.weight": (1, hidden), "score.bias": (1,)}


def _target_problems(base: Path, layers, targets: Any, exclude: Any, model: str) -> list[str]:
    from qerl_verl.lora.targets import find_problems
    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.checkpoint_files import read_config
    from qerl_verl.nvfp4.model_shapes import tower_linears

    tower = tower_linears(base) if exclude else ()
    problems = find_problems(layers, targets, exclude, key=f"{model}.", tower=tower)
    if get_architecture(read_config(base)).experts is None:
        return problems
    return [f"{problem} (routers, and the MLPs of layers without experts, have no adapter)" for problem in problems]


def adapted_layers(config: DictConfig, model: str, layers: Collection[str], adapter: dict | None) -> set[str]:
    """Returns the layers of a model that have an adapter in a run.

    Args:
        layers: full names, see :func:`~qerl_verl.nvfp4.model_shapes.adaptable_shapes`.
        adapter: the result of :func:`adopt_adapter`, None for a new adapter.
    """
    from qerl_verl.lora.targets import matched_layers

    if adapter:
        more = {name: adapter.get(name) for name in ("layers_to_transform", "layers_pattern")}
        return matched_layers(layers, adapter["target_modules"], adapter.get("exclude_modules"), **more)
    get = lambda name: OmegaConf.select(config, f"{model}.{name}")  # noqa: E731
    return matched_layers(layers, get("target_modules"), get("exclude_modules"))
