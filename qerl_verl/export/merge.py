"""Writes a model with the LoRA deltas added to its weights, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.lora.adapter_files import PREFIX, AdapterError, map_names, read_adapter_config, read_tensors
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.atomic_folder import atomic_folder
from qerl_verl.nvfp4.checkpoint_files import (
    CONFIG_FILE,
    check_space,
    copy_file,
    is_weight_file,
    load_hf_config,
    read_config,
    read_headers,
    source_files,
    write_json,
)
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.manifest import MANIFEST_FILE
from qerl_verl.nvfp4.model_shapes import adaptable_shapes, linear_shapes, split_experts
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.report import REPORT_FILE
from qerl_verl.nvfp4.safetensors_stream import TensorInfo, nbytes, read_tensor
from qerl_verl.nvfp4.shards import write_shards
from qerl_verl.nvfp4.validation import check_checkpoint

Format = Literal["merged", "fp8", "nvfp4"]

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
FP8_CONFIG = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
                "observer": "minmax",
            },
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
            "output_activations": None,
        }
    },
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
"""compressed-tensors' preset FP8_DYNAMIC, with one scale for each output channel of the weights and
one for each token of the activations, computed while serving."""


@dataclass(frozen=True)
class Deltas:
    """The LoRA deltas of an adapter, keyed by the full name of the linear.

    Attributes:
        factors: ``(A [rank, K], B [N, rank])`` of each adapted linear, float32 on the CPU.
        scaling: ``lora_alpha / rank``, or over the root of the rank for rsLoRA.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    scaling: float

    def add_to(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Adds scaling B A to ``weight`` in place and returns it.

        A linear without an adapter is not changed.

        Args:
            name: full name of the linear.
            weight: ``[N, K]`` float32.
        """
        if name in self.factors:
            a, b = (factor.to(weight.device) for factor in self.factors[name])
            weight.addmm_(b, a, alpha=self.scaling)
        return weight


def read_deltas(adapter: Path, base: Path) -> Deltas:
    """Reads the LoRA deltas of an adapter for the linears of a base.

    Raises:
        CheckpointError: the adapter is not plain LoRA or does not fit the base, with the reason.
    """
    layers = adaptable_shapes(base)
    try:
        config = read_adapter_config(adapter)
        tensors = read_tensors(adapter)
        places = map_names({name: tuple(t.shape) for name, t in tensors.items()}, config, layers)
    except AdapterError as error:
        raise CheckpointError(f"{adapter}: {error}") from error
    by_place = {place.removeprefix(PREFIX): tensors[name].float() for name, place in places.items()}
    linears = {place.partition(".lora_")[0] for place in by_place}
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    parts = {name: tuple(by_place[f"{name}.lora_{part}.weight"] for part in "AB") for name in linears}
    return Deltas(parts, scaling)


class Base:
    """The weights of a base, packed or in 16 bits, read as float32."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.packed = check_checkpoint(folder) == "nvfp4"
        config = load_hf_config(folder)
        architecture = get_architecture(config)
        self.tensors = split_experts(read_headers(folder), architecture, config)
        self.linears = linear_shapes(folder)
        self.ignored = [*architecture.plain_modules, *architecture.routers(config)]
        self.dtype = "F16" if self.tensors[architecture.embeddings].dtype == "F16" else "BF16"

    def others(self) -> dict[str, TensorInfo]:
        """Returns the tensors outside the decoder's linears: embeddings, norms, biases, lm_head."""
        of_linears = {f"{linear}.{part}" for linear in self.linears for part in _PARTS}
        return {name: info for name, info in self.tensors.items() if name not in of_linears}

    def weight(self, linear: str, device: torch.device) -> torch.Tensor:
        """Returns the decoded weight of a linear, ``[N, K]`` float32."""
        if not self.packed:
            return read_tensor(self.tensors[f"{linear}.weight"]).to(device).float()
        packed, scale, divisor = (read_tensor(self.tensors[f"{linear}.{part}"]).to(device) for part in _PACKED)
        return dequantize_nvfp4(packed, scale, divisor.reshape(1), torch.float32)


_PACKED = ("weight_packed", "weight_scale", "weight_global_scale")
_PARTS = ("weight", *_PACKED, "input_global_scale")


def export_merged(
    base: Path,
    adapter: Path,
    dst: Path,
    form: Format = "merged",
    *,
    device: str | None = None,
    progress: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Writes a model whose linears are those of the base, decoded, plus the LoRA deltas.

    The sum is computed in float32 and rounded once. Host memory stays at the largest tensor.

    Args:
        base: folder of an NVFP4 checkpoint, or of one in 16 or 32 bits.
        adapter: folder in PEFT's format.
        dst: folder to write, absent or empty. It appears when it is complete.
        form: ``merged`` has the base's 16-bit dtype, for transformers and vLLM; ``fp8`` is
            compressed-tensors FP8_DYNAMIC for serving; ``nvfp4`` rounds the merged weights to NVFP4
            again, which loses most of the deltas.
        device: where the sums are computed; by default the current GPU, or the CPU.
        progress: show a progress bar on stderr.
        max_shard_bytes: size in bytes above which another safetensors file is begun.

    Returns:
        ``linears``, the number of linears; ``adapted``, the number of those with a delta; with
        ``nvfp4`` also ``delta_kept``, see :func:`delta_kept`.

    Raises:
        CheckpointError: base and adapter do not fit together, ``dst`` is not empty, or the disk is
            too small.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} exists and is not an empty folder: choose another one.")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source, deltas = Base(base), read_deltas(adapter, base)
    result = {"linears": len(source.linears), "adapted": len(deltas.factors)}
    if form != "nvfp4":
        _write(source, deltas, dst, form, where, progress, max_shard_bytes)
        return result
    with atomic_folder(dst) as folder:
        merged = folder / "merged"
        _write(source, deltas, merged, "merged", where, progress, max_shard_bytes)
        quantize_checkpoint(merged, folder / "nvfp4", progress=progress)
        shutil.rmtree(merged)
        for file in (folder / "nvfp4").iterdir():
            file.rename(folder / file.name)
        (folder / "nvfp4").rmdir()
        return result | {"delta_kept": delta_kept(source, deltas, Base(folder), where)}


def delta_kept(base: Base, deltas: Deltas, merged: Base, device: torch.device) -> float:
    """Returns the fraction of the LoRA deltas that merged weights keep.

    It is ``sum <Q - W, D> / sum <D, D>`` over all linears, with the delta ``D`` of a linear, its
    base ``W`` and the written weight ``Q``: 1 where nothing is lost, 0 where nothing is left.
    """
    kept = total = 0.0
    for name in deltas.factors:
        weight = base.weight(name, device)
        delta = deltas.add_to(name, torch.zeros_like(weight))
        kept += torch.sum((merged.weight(name, device) - weight).double() * delta).item()
        total += torch.sum(delta.double().square()).item()
    return kept / total if total else 1.0


def _write(
    base: Base, deltas: Deltas, dst: Path, form: str, device: torch.device, progress: bool, max_shard_bytes: int
) -> None:
    units = [*_units(base, form)]
    total = sum(nbytes(*entry) for _, layout in units for entry in layout.values())
    check_space(dst, total)
    config = {
        k: v for k, v in read_config(base.folder).items() if k not in ("quantization_config", "compression_config")
    }
    if form == "fp8":
        config["quantization_config"] = FP8_CONFIG | {"ignore": base.ignored}
    with atomic_folder(dst) as folder:
        write_shards(
            folder,
            [(layout, unit) for unit, layout in units],
            lambda unit: _tensors(base, deltas, unit, form, device),
            title="Merging",
            progress=progress,
            max_shard_bytes=max_shard_bytes,
        )
        for name in source_files(base.folder):
            if name not in (CONFIG_FILE, MANIFEST_FILE, REPORT_FILE) and not is_weight_file(name):
                copy_file(base.folder / name, folder / name)
        write_json(folder / CONFIG_FILE, config)


def _units(base: Base, form: str) -> Iterator[tuple[str, dict[str, tuple[str, tuple[int, ...]]]]]:
    """Yields the units of writing: name of a tensor or linear, and output name -> (dtype,
    shape)."""
    for name, info in base.others().items():
        yield name, {name: (base.dtype if info.dtype == "F32" else info.dtype, info.shape)}
    for linear, (rows, columns) in base.linears.items():
        if form == "fp8":
            yield (
                linear,
                {f"{linear}.weight": ("F8_E4M3", (rows, columns)), f"{linear}.weight_scale": ("F32", (rows, 1))},
            )
        else:
            yield linear, {f"{linear}.weight": (base.dtype, (rows, columns))}


def _tensors(
    base: Base, deltas: Deltas, source: str, form: str, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    dtype = torch.float16 if base.dtype == "F16" else torch.bfloat16
    if source not in base.linears:
        tensor = read_tensor(base.tensors[source])
        yield source, tensor.to(dtype) if tensor.dtype == torch.float32 else tensor
        return
    weight = deltas.add_to(source, base.weight(source, device))
    if not torch.isfinite(weight).all():
        raise CheckpointError(f"{base.folder}: {source}.weight with its LoRA delta holds NaN or Inf.")
    if form == "fp8":
        scale = (weight.abs().amax(1, keepdim=True) / FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
        yield f"{source}.weight", (weight / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        yield f"{source}.weight_scale", scale
    else:
        yield f"{source}.weight", weight.to(dtype)


def export_adapter(adapter: Path, base: Path | None, dst: Path) -> dict[str, Any]:
    """Copies an adapter in PEFT's format to a folder of its own.

    Args:
        adapter: the adapter's folder.
        base: the model to check the adapter against; None checks the adapter alone.
        dst: folder to write, absent or empty.

    Returns:
        ``adapted``, the number of linears with a LoRA delta; None without a base.

    Raises:
        CheckpointError: the adapter is damaged or does not fit the base, or ``dst`` is not empty.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} exists and is not an empty folder: choose another one.")
    try:
        read_adapter_config(adapter)
        read_tensors(adapter)
    except AdapterError as error:
        raise CheckpointError(f"{adapter}: {error}") from error
    adapted = None if base is None else len(read_deltas(adapter, base).factors)
    with atomic_folder(dst) as folder:
        for file in sorted(adapter.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                copy_file(file, folder / file.name)
    return {"adapted": adapted}
