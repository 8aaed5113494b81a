"""Finds the model and the adapters of an evaluation, and checks them before an engine starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.export.locate import find_adapter
from qerl_verl.lora.adapter_files import AdapterError, map_names, read_adapter_config, read_tensors
from qerl_verl.nvfp4.cache import Quantization, fetch_model, fingerprint, resolve_checkpoint
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.model_shapes import adaptable_shapes
from qerl_verl.nvfp4.validation import check_checkpoint

BASE = "base"
"""Name of the policy without an adapter."""

MAX_RANK = 512
"""The largest rank of vLLM's LoRA path (vllm/config/lora.py, MaxLoRARanks)."""


@dataclass(frozen=True)
class Model:
    """The base of an evaluation.

    Attributes:
        given: the model as the user named it.
        folder: the folder that vLLM loads.
        form: ``nvfp4`` for every packed checkpoint, otherwise ``bf16``: the arm of the switch that
            the engine runs as.
        fingerprint: hash of the weights.
        notes: settings of the checkpoint that are not used.
    """

    given: str
    folder: Path
    form: Literal["nvfp4", "bf16"]
    fingerprint: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the model.

    Attributes:
        name: the adapter as the user named it.
        folder: the folder with ``adapter_config.json``.
        config: the content of that file.
        digest: hash of configuration and tensors.
        base_model: the base that the adapter names, or None.
        base_fingerprint: hash of the base that it was trained on, where its checkpoint records it.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    digest: str
    base_model: str | None
    base_fingerprint: str | None

    @property
    def rank(self) -> int:
        return self.config["r"]

    @property
    def scaling(self) -> float:
        return self.config["lora_alpha"] / (self.rank**0.5 if self.config.get("use_rslora") else self.rank)


def find_model(given: str, cache_dir: Path | None = None, quantization: Quantization | None = None) -> Model:
    """Returns the model as an engine loads it.

    Args:
        given: a folder, or a name on the Hugging Face hub.
        cache_dir: cache of quantized checkpoints.
        quantization: how a 16- or 32-bit model is quantized first; None uses it as it is.

    Raises:
        CheckpointError: the model cannot be fetched, read or quantized.
    """
    folder = fetch_model(given)
    kind = check_checkpoint(folder)
    if quantization is None and kind == "none":
        return Model(given, folder, "bf16", fingerprint(folder, cache_dir))
    resolved = resolve_checkpoint(folder, cache_dir, quantization or Quantization())
    if quantization is not None and kind == "nvfp4":
        raise CheckpointError(f"{given} is quantized already; leave --quantize out")
    path = resolved.path.absolute()
    return Model(given, path, "nvfp4", fingerprint(path, cache_dir), resolved.notes)


def expand(given: Iterable[str]) -> list[str]:
    """Expands the folder of a run to all of its checkpoints, in the order of their steps.

    Other adapters stay as they were given.
    """
    out = []
    for name in given:
        folder = Path(name).expanduser()
        steps = [p for p in folder.glob("global_step_*") if p.name.rpartition("_")[2].isdigit() and p.is_dir()]
        if steps and not any(
            (folder / place).is_file() for place in ("adapter_config.json", "lora_adapter/adapter_config.json")
        ):
            out += [f"{name.rstrip('/')}/{p.name}" for p in sorted(steps, key=lambda p: int(p.name.rpartition("_")[2]))]
        else:
            out.append(name.rstrip("/") or name)
    return out


def check_adapters(given: Sequence[str], folder: Path) -> list[Adapter]:
    """Finds adapters and checks that the layers of a model have a place for each tensor.

    Args:
        given: folders of PEFT adapters or checkpoints of runs, see :func:`expand`.
        folder: the model's folder, quantized or not.

    Raises:
        EvaluationError: adapters do not fit; has a sentence for each problem.
    """
    layers, out, problems = adaptable_shapes(folder), [], []
    for name in expand(given):
        try:
            out.append(_check(name, folder, layers))
        except AdapterError as error:
            problems += [f"--adapter {name}: {problem}" for problem in error.problems]
        except (CheckpointError, OSError) as error:
            problems.append(f"--adapter {name}: {error}")
    names = [adapter.name for adapter in out]
    problems += [f"--adapter {name}: given twice" for name in sorted({n for n in names if names.count(n) > 1})]
    if problems:
        raise EvaluationError(problems)
    return out


def check_bases(adapters: Sequence[Adapter], model: Model) -> None:
    """Checks that adapters were trained on a model's weights, where their checkpoints record it.

    Raises:
        EvaluationError: some adapters were trained on other weights.
    """
    problems = [
        f"--adapter {adapter.name}: it was trained on other weights than those of {model.folder}: "
        f"its checkpoint records the fingerprint {adapter.base_fingerprint}, this model has "
        f"{model.fingerprint}. Give the base of its run ({adapter.base_model}, with the --quantize "
        "of that run), or --other-base to evaluate it on this one anyway"
        for adapter in adapters
        if adapter.base_fingerprint not in (None, model.fingerprint)
    ]
    if problems:
        raise EvaluationError(problems)


def _check(name: str, folder: Path, layers: dict[str, tuple[int, int]]) -> Adapter:
    if name == BASE:
        raise AdapterError([f"`{BASE}` stands for the model without an adapter; give the folder as ./{BASE}"])
    source = find_adapter(Path(name).expanduser().absolute())
    config = read_adapter_config(source.adapter)
    if config["r"] > MAX_RANK:
        raise AdapterError([f"rank {config['r']}; vLLM's LoRA path takes {MAX_RANK} at most"])
    tensors = read_tensors(source.adapter)
    try:
        map_names({n: tuple(t.shape) for n, t in tensors.items()}, config, layers)
    except AdapterError as error:
        bases = f"(it was trained on {source.base_model or 'another model'}; MODEL is {folder})"
        raise AdapterError([f"{problem} {bases}" for problem in error.problems]) from None
    digest = _digest(config, tensors)
    return Adapter(name, source.adapter, config, digest, source.base_model, source.base_fingerprint)


def _digest(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    scaling = (config["r"], config["lora_alpha"], bool(config.get("use_rslora")))
    digest = hashlib.sha256(repr(scaling).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_plain(adapter: Adapter, model: Model, folder: Path) -> None:
    """Writes an adapter with PEFT's own names and safetensors, whatever its file looks like.

    Raises:
        EvaluationError: the adapter was replaced after the checks.
        AdapterError: the adapter cannot be read.
    """
    from peft import LoraConfig

    from qerl_verl.lora.peft import save_adapter

    tensors = read_tensors(adapter.folder)
    if _digest(read_adapter_config(adapter.folder), tensors) != adapter.digest:
        raise EvaluationError(f"--adapter {adapter.name}: it was replaced while the evaluation ran; call it again")
    names = map_names({n: tuple(t.shape) for n, t in tensors.items()}, adapter.config, adaptable_shapes(model.folder))
    config = LoraConfig.from_pretrained(str(adapter.folder))
    save_adapter(folder, {place: tensors[name] for name, place in names.items()}, config, str(model.folder))
