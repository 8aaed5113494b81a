"""Converts other programs' 4-bit checkpoints to ``nvfp4-pack-quantized`` without rounding again.

NVIDIA ModelOpt's NVFP4 (``hf_quant_config.json``, or ``quant_algo: NVFP4`` in config.json) has the
same codes and block scales under other names. It stores the tensor's scale as a factor where
compressed-tensors stores its reciprocal:

    X.weight             -> X.weight_packed
    X.weight_scale       -> X.weight_scale
    1 / X.weight_scale_2 -> X.weight_global_scale

compressed-tensors' MXFP4 (``mxfp4-pack-quantized``) has one power of two (E8M0) for 32 values. It
becomes two equal E4M3 scales, where the exponents of a linear span no more than E4M3 holds (arXiv
2310.10537; OCP Microscaling Formats v1.0).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qerl_verl.kernels.mxfp4_quantize import LARGEST_SCALE_EXPONENT, LARGEST_SPAN, MX_BLOCK_SIZE, container_scales
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
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
    read_json,
    source_files,
    write_json,
)
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import QUANTIZATION_CONFIG, WEIGHT_DTYPES, packed_layout
from qerl_verl.nvfp4.manifest import MANIFEST_FILE, write_manifest
from qerl_verl.nvfp4.model_shapes import fused_linears, linear_shapes, name_group
from qerl_verl.nvfp4.report import REPORT_FILE
from qerl_verl.nvfp4.safetensors_stream import FileRecord, nbytes, read_tensor
from qerl_verl.nvfp4.shards import write_shards
from qerl_verl.nvfp4.tensor_checks import check_names, check_plain_linears, check_tensors

Foreign = Literal["modelopt", "mxfp4"]
"""A format that :func:`convert_checkpoint` reads."""

CONVERT_VERSION = 1
"""Part of the cache key. Raise it when a change makes the same source give other bytes."""

MODELOPT_FILE = "hf_quant_config.json"
MXFP4_FORMAT = "mxfp4-pack-quantized"
_MX_BIAS = 127
"""Exponent bias of E8M0, in which MXFP4 stores shared exponents."""

_DROPPED = re.compile(
    r"\.(input_scale|input_global_scale|k_scale|v_scale|q_scale|k_proj\.output_scale|v_proj\.output_scale)$"
)
"""Scales of activations and of a KV cache; activations, keys and values stay in 16 bits."""


def foreign_format(path: Path) -> Foreign | None:
    """Returns the convertible 4-bit format of a folder, or None for any other checkpoint.

    Raises:
        CheckpointError: config.json is not readable; or ModelOpt used another algorithm than NVFP4.
    """
    quantization = read_config(path).get("quantization_config") or {}
    if quantization.get("quant_method") == "compressed-tensors":
        return "mxfp4" if quantization.get("format") == MXFP4_FORMAT else None
    settings = modelopt_settings(path)
    if settings is None:
        return None
    if settings.get("quant_algo") != "NVFP4" or settings.get("group_size", BLOCK_SIZE) != BLOCK_SIZE:
        raise CheckpointError(
            f"{path}: ModelOpt's quant_algo {settings.get('quant_algo')} with group_size "
            f"{settings.get('group_size')} cannot be used; NVFP4 with {BLOCK_SIZE} can. Give such "
            "an export, or the original model in 16 bits."
        )
    return "modelopt"


def modelopt_settings(path: Path) -> dict[str, Any] | None:
    """Returns ModelOpt's record of its quantization, or None without one.

    Its keys are ``quant_algo``, ``group_size``, ``exclude_modules`` and ``kv_cache_quant_algo``.
    """
    file, config = path / MODELOPT_FILE, read_config(path)
    if file.is_file():
        return read_json(file, "Fetch it again.").get("quantization") or {}
    quantization = config.get("quantization_config") or {}
    if quantization.get("quant_method") != "modelopt" and "quant_algo" not in quantization:
        return None
    settings = dict(quantization.get("quantization") or quantization)
    groups = settings.get("config_groups") or {}
    sizes = {g["weights"]["group_size"] for g in groups.values() if (g.get("weights") or {}).get("group_size")}
    if sizes and "group_size" not in settings:
        settings["group_size"] = sizes.pop() if len(sizes) == 1 else None
    settings.setdefault("exclude_modules", settings.get("ignore") or [])
    return settings


@dataclass(frozen=True)
class _Linear:
    """A linear of the source: packed, or in 16 bits."""

    name: str
    rows: int
    columns: int
    packed: bool


def check_foreign(path: Path) -> None:
    """Checks from headers and tensor scales that a checkpoint of another format can be converted.

    Raises:
        UnsupportedArchitecture, CheckpointError: names the first tensor that is wrong.
    """
    _Source(path)


class _Source:
    """A checkpoint of another format."""

    def __init__(self, path: Path):
        self.path = path
        kind = foreign_format(path)
        if kind is None:
            raise CheckpointError(f"{path} is neither ModelOpt's NVFP4 nor compressed-tensors' MXFP4.")
        self.kind: Foreign = kind
        self.config = read_config(path)
        self.architecture = get_architecture(self.config)
        self.hf_config = load_hf_config(path)
        self.tensors = {n: i for n, i in read_headers(path).items() if not _DROPPED.search(n)}
        shapes = self.architecture.tensor_shapes(self.hf_config)
        linears = linear_shapes(path)
        self.others = {name: shape for name, shape in shapes.items() if name.removesuffix(".weight") not in linears}
        self.linears = {n: self._look_at(n, *shape) for n, shape in linears.items()}
        self.routers = self.architecture.routers(self.hf_config)
        check_plain_linears(path, self.tensors, self.architecture.plain_linears(self.hf_config))
        check_tensors(path, self.tensors, self.others, WEIGHT_DTYPES)
        self._refuse_unknown()
        self._refuse_mixed_groups()

    @property
    def quantized_head(self) -> str | None:
        """Name of a tensor of a quantized output layer, if the source has one."""
        parts = self._parts("lm_head")
        return next((name for name in parts if name in self.tensors and self.tensors[name].dtype == "U8"), None)

    def _parts(self, linear: str) -> tuple[str, ...]:
        names = {
            "modelopt": ("weight", "weight_scale", "weight_scale_2"),
            "mxfp4": ("weight_packed", "weight_scale"),
        }[self.kind]
        return tuple(f"{linear}.{name}" for name in names)

    def _look_at(self, linear: str, rows: int, columns: int) -> _Linear:
        codes, *scales = self._parts(linear)
        plain = f"{linear}.weight"
        if plain in self.tensors and self.tensors[plain].dtype in WEIGHT_DTYPES:
            check_tensors(self.path, self.tensors, {plain: (rows, columns)}, WEIGHT_DTYPES)
            return _Linear(linear, rows, columns, packed=False)
        check_tensors(self.path, self.tensors, {codes: (rows, columns // 2)}, ("U8",))
        block = BLOCK_SIZE if self.kind == "modelopt" else MX_BLOCK_SIZE
        dtype = ("F8_E4M3",) if self.kind == "modelopt" else ("U8",)
        check_tensors(self.path, self.tensors, {scales[0]: (rows, columns // block)}, dtype)
        if self.kind == "modelopt":
            info = self.tensors.get(scales[1])
            if info is None or info.dtype != "F32" or math.prod(info.shape) != 1:
                raise CheckpointError(f"{self.path}: tensor {scales[1]} has to be one float32. Export the model again.")
            value = read_tensor(info).item()
            if not 0 < value < math.inf:
                raise CheckpointError(
                    f"{info.file}: tensor {scales[1]} is {value:g}; it multiplies the weight, so "
                    "it has to be a positive, finite number. Fetch or export the checkpoint again."
                )
        return _Linear(linear, rows, columns, packed=True)

    def _refuse_unknown(self) -> None:
        if (name := self.quantized_head) is not None:
            raise CheckpointError(
                f"{self.tensors[name].file}: {name} is quantized, but the output layer stays in 16 "
                "bits here. Export the model with lm_head among the excluded modules."
            )
        known = set(self.others)
        for linear in self.linears.values():
            known |= set(self._parts(linear.name)) if linear.packed else {f"{linear.name}.weight"}
        check_names(self.path, self.tensors, known, self.architecture, self.hf_config.tie_word_embeddings)

    def _refuse_mixed_groups(self) -> None:
        for group in fused_linears(self.architecture, self.hf_config):
            if len({self.linears[name].packed for name in group}) > 1:
                raise CheckpointError(
                    f"{self.path}: of {name_group(group)} some are quantized and some are not, but "
                    "vLLM fuses them. Exclude all of them or none."
                )

    def groups(self) -> Iterator[tuple[_Linear, ...]]:
        """Yields the linears that share a global scale when quantized here, each other one
        alone."""
        for group in self.architecture.all_groups(self.hf_config):
            yield tuple(self.linears[name] for name in group)

    def tensors_of(self, unit: str | tuple[_Linear, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the output tensors of a unit: a tensor that is copied, or linears that vLLM
        fuses."""
        if isinstance(unit, str):
            tensor = read_tensor(self.tensors[unit])
            yield unit, tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
        else:
            yield from self.convert(unit)

    def convert(self, group: tuple[_Linear, ...]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the output tensors of linears that vLLM fuses, in the order of :meth:`layout`."""
        if not group[0].packed:
            for linear in group:
                tensor = read_tensor(self.tensors[f"{linear.name}.weight"])
                yield f"{linear.name}.weight", tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
            return
        exponents = self._exponents(group) if self.kind == "mxfp4" else {}
        for linear in group:
            codes, scale, *_ = self._parts(linear.name)
            if self.kind == "modelopt":
                factor = read_tensor(self.tensors[self._parts(linear.name)[2]]).reshape(1)
                block_scale, divisor = read_tensor(self.tensors[scale]), 1.0 / factor
            else:
                block_scale, divisor = self._mx_scales(linear, exponents)
            yield f"{linear.name}.weight_global_scale", divisor.float()
            yield f"{linear.name}.weight_packed", read_tensor(self.tensors[codes])
            yield f"{linear.name}.weight_scale", block_scale

    def layout(self, group: tuple[_Linear, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Returns output name -> (dtype, shape)."""
        layout = {}
        for linear in group:
            if linear.packed:
                layout |= packed_layout(linear.name, linear.rows, linear.columns)
            else:
                info = self.tensors[f"{linear.name}.weight"]
                layout[f"{linear.name}.weight"] = ("BF16" if info.dtype == "F32" else info.dtype, info.shape)
        return layout

    def _shared_exponents(self, linear: _Linear) -> torch.Tensor:
        """Returns ``[N, K / 32]`` int32; a block of zeros gets the largest exponent of its linear.

        Raises:
            CheckpointError: a scale is NaN.
        """
        codes, scale = (read_tensor(self.tensors[name]) for name in self._parts(linear.name))
        if (scale == 255).any():
            raise CheckpointError(
                f"{self.path}: tensor {linear.name}.weight_scale holds NaN. Fetch or export the checkpoint again."
            )
        exponent = scale.int() - _MX_BIAS
        empty = ((codes & 0x77) == 0).unflatten(1, (-1, MX_BLOCK_SIZE // 2)).all(-1)
        if empty.all():
            return torch.zeros_like(exponent)
        return exponent.masked_fill(empty, int(exponent[~empty].max()))

    def _exponents(self, group: tuple[_Linear, ...]) -> dict[str, tuple[torch.Tensor, int]]:
        """Returns linear -> its exponents, and the one that becomes E4M3's largest power of two.

        The linears of the group share the latter where the span of their exponents allows it.
        """
        found = {linear.name: self._shared_exponents(linear) for linear in group}
        top = max(int(e.max()) for e in found.values())
        if top - min(int(e.min()) for e in found.values()) <= LARGEST_SPAN:
            return {name: (exponent, top) for name, exponent in found.items()}
        return {name: (exponent, int(exponent.max())) for name, exponent in found.items()}

    def _mx_scales(self, linear: _Linear, exponents: dict) -> tuple[torch.Tensor, torch.Tensor]:
        exponent, top = exponents[linear.name]
        span = top - int(exponent.min())
        if span > LARGEST_SPAN:
            raise CheckpointError(
                f"{self.path}: the exponents of {linear.name}.weight_scale span {span}, and "
                f"NVFP4's block scales hold {LARGEST_SPAN}, so it cannot be converted without "
                "loss. Quantize the original model with `qerl quantize`."
            )
        divisor = 2.0 ** (LARGEST_SCALE_EXPONENT - top)
        if not 0 < divisor < math.inf or not math.isfinite(2.0**-126 * divisor if divisor > 1 else divisor):
            raise CheckpointError(
                f"{self.path}: the exponent {top} of {linear.name}.weight_scale is outside float32's range."
            )
        return container_scales(exponent, top), torch.tensor([divisor])


def convert_checkpoint(
    src: str | Path, dst: str | Path, *, progress: bool = True, max_shard_bytes: int = 5_000_000_000
) -> dict[str, FileRecord]:
    """Writes a checkpoint of another 4-bit format as ``nvfp4-pack-quantized``.

    Codes and block scales stay as they are. Linears in 16 bits stay so and are listed under
    ``ignore``. Scales of activations and of a KV cache are dropped. Host memory stays at about one
    group of linears.

    Args:
        src: folder in ModelOpt's NVFP4 or compressed-tensors' MXFP4.
        dst: folder to write, absent or empty. It appears when it is complete.
        progress: show a progress bar on stderr.
        max_shard_bytes: size in bytes above which another safetensors file is begun.

    Returns:
        File name -> size and SHA-256, of every file in ``dst``.

    Raises:
        UnsupportedArchitecture, CheckpointError: the source is damaged, incomplete or not
            convertible without loss, with the tensor's name; ``dst`` is not empty; the disk is
            full.
    """
    src, dst = Path(src), Path(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise CheckpointError(f"{dst} exists and is not an empty folder: choose another one.")
    source = _Source(src)
    units: list[tuple[dict, Any]] = []
    for name, info in source.tensors.items():
        if name in source.others:
            units.append(({name: ("BF16" if info.dtype == "F32" else info.dtype, info.shape)}, name))
    units += [(source.layout(group), group) for group in source.groups()]
    total = sum(nbytes(*entry) for layout, _ in units for entry in layout.values())
    check_space(dst, total)

    ours = (CONFIG_FILE, MANIFEST_FILE, REPORT_FILE, MODELOPT_FILE)
    plain = [linear.name for linear in source.linears.values() if not linear.packed]
    config = {k: v for k, v in source.config.items() if k != "compression_config"}
    ignored = [*source.architecture.plain_modules, *source.routers, *plain]
    config["quantization_config"] = QUANTIZATION_CONFIG | {"ignore": ignored}
    with atomic_folder(dst) as folder:
        records = write_shards(
            folder,
            units,
            source.tensors_of,
            title=f"Converting {source.kind} to NVFP4",
            progress=progress,
            max_shard_bytes=max_shard_bytes,
        )
        for name in source_files(src):
            if name not in ours and not is_weight_file(name):
                records[name] = copy_file(src / name, folder / name)
        records[CONFIG_FILE] = write_json(folder / CONFIG_FILE, config)
        write_manifest(folder, src, f"converted from {source.kind}", records)
    return records
