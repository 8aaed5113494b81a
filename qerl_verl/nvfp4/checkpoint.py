"""Quantizes a 16- or 32-bit Hugging Face checkpoint to NVFP4, and recognises and checks NVFP4 ones.

The output has the format that compressed-tensors 0.17 calls ``nvfp4-pack-quantized``, with its
preset ``NVFP4A16`` (``compressed_tensors/quantization/quant_scheme.py``). Each linear ``X`` of the
decoder layers becomes ``X.weight_packed``, ``X.weight_scale`` and ``X.weight_global_scale``; all
other tensors are in 16 bits. vLLM and transformers load such a folder as it is.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from qerl_verl.kernels.mxfp4_quantize import LARGEST_SPAN, MX_BLOCK_SIZE, NO_EXPONENT, mxfp4_exponents
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.nvfp4.architectures import Architecture, UnsupportedArchitecture, get_architecture
from qerl_verl.nvfp4.atomic_folder import atomic_folder, settle_leftovers
from qerl_verl.nvfp4.calibration import Calibration
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.gptq import GPTQ_VERSION
from qerl_verl.nvfp4.layerwise import FinishedLayers, compare_checkpoints, gptq_layers
from qerl_verl.nvfp4.quantizers import (
    METHODS,
    NEEDS_CALIBRATION,
    PackedLinear,
    SquaredError,
    round_weight,
    shared_global_scale,
    tensors_of,
)
from qerl_verl.nvfp4.report import REPORT_FILE, build_report
from qerl_verl.nvfp4.safetensors_stream import (
    FileRecord,
    HashedFile,
    ShardWriter,
    TensorInfo,
    nbytes,
    read_header,
    read_pieces,
    read_tensor,
)
from qerl_verl.nvfp4.unused_tensors import is_unused

FORMAT = "nvfp4-pack-quantized"
FORMAT_VERSION = 2
"""Part of the cache key. Raise it when a change makes the same source give other bytes."""

QUANTIZATION_CONFIG = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "float",
                "symmetric": True,
                "group_size": BLOCK_SIZE,
                "strategy": "tensor_group",
                "block_structure": None,
                "dynamic": False,
                "actorder": None,
                "scale_dtype": "torch.float8_e4m3fn",
                "zp_dtype": None,
                "observer": "memoryless_minmax",
                "observer_kwargs": {},
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    },
    "format": FORMAT,
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.17.0",
}
"""``quantization_config`` as ``ModelCompressor.update_config`` of compressed-tensors 0.17.0 writes
it."""

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MANIFEST_FILE = "qerl_manifest.json"
PICKLES = (".bin", ".pth")
PICKLES_ALONE = (
    f"holds PyTorch pickles ({', '.join(PICKLES)}) and no {SINGLE_FILE} or {INDEX_FILE}. Convert it: load it with "
    "transformers' from_pretrained and write it with save_pretrained."
)
_WEIGHT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.ot"),
)
WEIGHT_DTYPES = ("F32", "BF16", "F16")
_NAN_SCALE, _NEGATIVE_ZERO = 0x7F, 0x80  # E4M3 bytes
_ANNOUNCED_SCALES = 500_000_000  # bytes; a larger amount of scales is read behind a progress bar
# Bounds of a global scale: the scale and its reciprocal are normal float32 numbers.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    method: str = "four-over-six",
    calibration: Calibration | None = None,
    device: str | torch.device | None = None,
    replace: bool = False,
    progress: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, FileRecord]:
    """Quantizes the linears of a checkpoint to NVFP4.

    The q, k, v, o, gate, up and down projections are packed. q, k and v of a layer share one global
    scale, and so do gate and up, for each expert separately. lm_head, embeddings, expert routers,
    norms and biases stay in bfloat16 or float16; float32 tensors become bfloat16. The tokenizer,
    the generation config and every other file that holds no weights are copied. Tensors are read
    one group of linears with a common scale at a time, so host memory stays at about one decoder
    layer. ``qerl_report.json`` lists the quantization errors.

    GPTQ keeps each finished layer in a folder ``<name>.layers-<key>`` beside ``dst`` until ``dst``
    is complete. After a kill or a full disk, the same call continues with the first missing layer.

    Args:
        src: folder with config.json and safetensors (one file, or shards and an index) in float32,
            bfloat16 or float16. Experts are one matrix each, or stacked as transformers'
            ``save_pretrained(save_original_format=False)`` writes them; the output has one matrix
            for each.
        dst: folder to write, absent or empty. It appears when it is complete. An error leaves
            nothing behind except GPTQ's finished layers.
        method: see :data:`~qerl_verl.nvfp4.quantizers.Method`.
        calibration: the text that GPTQ minimizes the output error on. With every method, the report
            includes the loss on its ``held_out`` sequences.
        device: where to compute; by default the current GPU, or the CPU where there is none.
        replace: allow ``dst`` to be a checkpoint that this function wrote, with nothing else in it.
            The old folder is moved aside when the new one is complete and removed when the new one
            is in place. After a kill either of them is at ``dst``, or the next call moves the old
            one back.
        progress: show a progress bar on stderr.
        max_shard_bytes: size in bytes above which another safetensors file is begun.

    Returns:
        File name -> size and SHA-256 of every file in ``dst``, as in its ``qerl_manifest.json``.

    Raises:
        UnsupportedArchitecture: the model is none of
            :func:`~qerl_verl.nvfp4.architectures.supported_architectures`.
        CheckpointError: the source is incomplete, damaged, already quantized, or holds NaN, Inf or
            tensors that the model does not have; the number of input channels of a weight is not a
            multiple of 16; ``dst`` is not empty or may not be replaced; the disk or the GPU memory
            is full; GPTQ has no calibration text.
    """
    if method not in METHODS:
        raise CheckpointError(f"method {method}: choose one of {', '.join(METHODS)}.")
    if method in NEEDS_CALIBRATION and calibration is None:
        raise CheckpointError(f"method {method} needs a calibration text (--calibration FILE).")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    src, dst = Path(src), Path(dst)
    if read_quantization(src) == "nvfp4":
        raise CheckpointError(f"{src} is already an NVFP4 checkpoint: use it as it is.")
    settle_leftovers(dst)
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        if not replace:
            raise CheckpointError(
                f"{dst} exists and is not an empty folder: choose another one. --force replaces a checkpoint that `qerl "
                "quantize` wrote."
            )
        _check_replaceable(src, dst)
    config = read_config(src)
    architecture = get_architecture(config)
    hf_config = _hf_config(src)
    tensors = _check_source(src, architecture, hf_config)
    units = _plan(tensors, architecture, hf_config)
    ours = (CONFIG_FILE, MANIFEST_FILE, REPORT_FILE)
    others = [name for name in source_files(src) if name not in ours and not _is_weight(name)]

    written = sum(unit.output_bytes for unit in units) + sum((src / name).stat().st_size for name in others)
    finished = None
    if method == "gptq" and calibration is not None:
        finished = FinishedLayers(dst, _attempt_key(src, tensors, calibration))
        written += max(0, sum(unit.output_bytes for unit in units if unit.quantize) - finished.nbytes)
    _check_space(dst, written)
    ignored = [*architecture.plain_modules, *architecture.routers(hf_config)]
    config["quantization_config"] = QUANTIZATION_CONFIG | {"ignore": ignored}
    dtype = "float16" if tensors[architecture.embeddings].dtype == "F16" else "bfloat16"
    _set_dtype(config, dtype)

    try:
        packer: _Rounder | _Finished = _Rounder(method, device)
        if finished is not None and calibration is not None:
            packer = _Finished(gptq_layers(hf_config, tensors, calibration, finished, device, progress))
        with atomic_folder(dst, replace=replace) as folder:
            records = _write_weights(folder, tensors, units, max_shard_bytes, progress, packer)
            for name in others:
                records[name] = _copy(src / name, folder / name)
            records[CONFIG_FILE] = _write_json(folder / CONFIG_FILE, config)
            text = None
            if calibration is not None:
                packed = read_headers(folder)
                text = compare_checkpoints(hf_config, tensors, packed, calibration.held_out, device, progress)
            report = build_report(method, packer.errors, architecture.layer_prefix, calibration, text)
            records[REPORT_FILE] = _write_json(folder / REPORT_FILE, report)
            manifest = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "method": method,
                "calibration": calibration.describe() if calibration else None,
                "source": str(src.resolve()),
                "files": {name: asdict(record) for name, record in records.items()},
            }
            _write_json(folder / MANIFEST_FILE, manifest)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{dst}: the disk (or the quota) was full before all of the {_gb(written)} were written. The incomplete "
                f"folder is removed{finished.kept if finished else ''}. Free some space, or choose a folder on another disk."
            ) from error
        raise
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"{dst}: {device} has too little free memory for {method} ({error}). Free some, or choose another device or "
            f"method (four-over-six needs the least){finished.kept if finished else ''}."
        ) from error
    if finished is not None:
        finished.remove()
    return records


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Sets the dtype of the unpacked tensors in the content of config.json and its parts, in
    place."""
    config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"torch_dtype": dtype}
    for part in (config.get("text_config"), config.get("vision_config")):
        if part:
            part |= {key: dtype for key in ("dtype", "torch_dtype") if key in part}


def _attempt_key(src: Path, tensors: dict[str, TensorInfo], calibration: Calibration) -> str:
    """Returns a hash of what the finished layers depend on; sizes and times identify source
    files."""
    files = sorted({info.file for info in tensors.values()} | {src / CONFIG_FILE})
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([FORMAT_VERSION, GPTQ_VERSION, stamps, calibration.key])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _check_replaceable(src: Path, dst: Path) -> None:
    """Refuses to replace a folder whose content :func:`quantize_checkpoint` did not write.

    Raises:
        CheckpointError: ``dst`` contains ``src``, lacks a manifest, or holds a file that its
            manifest does not list.
    """
    why = "SRC lies in it" if src.resolve().is_relative_to(dst.resolve()) else None
    try:
        ours = {MANIFEST_FILE, *json.loads((dst / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        why = why or f"it has no readable {MANIFEST_FILE}, so `qerl quantize` did not write it"
    else:
        files = sorted(str(path.relative_to(dst)) for path in dst.rglob("*") if not path.is_dir() or path.is_symlink())
        others = [name for name in files if name not in ours]
        if others and not why:
            why = f"it also holds {others[0]}, which `qerl quantize` did not write"
    if why:
        raise CheckpointError(f"{dst}: --force does not replace this folder, because {why}. Choose another DST.")


def read_quantization(path: str | Path) -> Literal["none", "nvfp4"]:
    """Returns how the weights of a checkpoint folder are stored, according to its config.json.

    NVFP4 means compressed-tensors' ``nvfp4-pack-quantized``, from this package or from
    llm-compressor. The scheme may be weight-only (NVFP4A16) or include activations (NVFP4), which
    does not affect the weights.

    Raises:
        CheckpointError: config.json is not readable, or names another quantization.
    """
    path = Path(path)
    config = read_config(path)
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not quantization:
        if (path / "hf_quant_config.json").exists():
            raise _other_quantization(path, "modelopt (hf_quant_config.json)")
        return "none"
    method = quantization.get("quant_method") or "unknown"
    if method != "compressed-tensors":
        raise _other_quantization(path, f"quant_method {method}")
    if quantization.get("format") != FORMAT:
        raise _other_quantization(path, f"compressed-tensors format {quantization.get('format')}")
    for setting, inner in (("sparsity_config", "format"), ("transform_config", "config_groups")):
        value = (quantization.get(setting) or {}).get(inner)
        if value and value != "dense":
            raise _other_quantization(path, f"compressed-tensors with {setting}")
    for name, group in quantization.get("config_groups", {}).items():
        weights = group.get("weights") or {}
        if not weights and all(target.endswith("Attention") for target in group.get("targets") or [""]):
            continue  # a scheme of the KV cache, see unused_settings
        found = tuple(weights.get(key) for key in ("num_bits", "type", "group_size", "strategy", "symmetric"))
        if found != (4, "float", BLOCK_SIZE, "tensor_group", True):
            raise _other_quantization(path, f"compressed-tensors, config_groups.{name}: weights {weights}")
    return "nvfp4"


def check_checkpoint(path: str | Path) -> Literal["none", "nvfp4", "modelopt", "mxfp4"]:
    """Checks that a model folder can be used: as it is, quantized, or converted. Writes nothing.

    Reads the headers of a 16- or 32-bit checkpoint, and also the scales of an NVFP4 checkpoint.

    Returns:
        As :func:`read_quantization`, or a format that :mod:`qerl_verl.nvfp4.convert` converts.

    Raises:
        UnsupportedArchitecture, CheckpointError: as :func:`quantize_checkpoint` or
            :func:`validate_nvfp4_checkpoint`.
    """
    from qerl_verl.nvfp4.convert import check_foreign, foreign_format  # convert imports this module

    path = Path(path)
    if foreign := foreign_format(path):
        check_foreign(path)
        return foreign
    kind = read_quantization(path)
    if kind == "nvfp4":
        validate_nvfp4_checkpoint(path)
    else:
        architecture, hf_config = get_architecture(read_config(path)), _hf_config(path)
        _plan(_check_source(path, architecture, hf_config), architecture, hf_config)
    return kind


def linear_shapes(path: str | Path) -> dict[str, tuple[int, int]]:
    """Returns full name -> (output, input features) of a model's packed, or packable, linears.

    Args:
        path: a model folder, quantized or not. Only its config.json is read.

    Raises:
        UnsupportedArchitecture: the model is not supported.
        CheckpointError: config.json is not readable.
    """
    path = Path(path)
    architecture, hf_config = get_architecture(read_config(path)), _hf_config(path)
    shapes = architecture.tensor_shapes(hf_config)
    linears = [linear for group in architecture.all_groups(hf_config) for linear in group]
    return {linear: (shapes[f"{linear}.weight"][0], shapes[f"{linear}.weight"][1]) for linear in linears}


def adaptable_shapes(path: str | Path) -> dict[str, tuple[int, int]]:
    """Returns full name -> (output, input features) of the linears that can have a LoRA adapter.

    See :meth:`~qerl_verl.nvfp4.architectures.Architecture.adaptable`.

    Raises:
        UnsupportedArchitecture, CheckpointError: as :func:`linear_shapes`.
    """
    shapes = linear_shapes(path)
    return {linear: shapes[linear] for linear in get_architecture(read_config(Path(path))).adaptable(shapes)}


def tower_linears(path: str | Path) -> list[str]:
    """Returns the full names of the 16-bit linears of a model's vision tower, if it has one.

    Args:
        path: see :func:`linear_shapes`.

    Raises:
        UnsupportedArchitecture, CheckpointError: as :func:`linear_shapes`.
    """
    path = Path(path)
    architecture = get_architecture(read_config(path))
    shapes = architecture.tensor_shapes(_hf_config(path)) if architecture.vision else {}
    tower = (name for name, shape in shapes.items() if name.startswith(architecture.vision) and len(shape) == 2)
    return [name.removesuffix(".weight") for name in tower]


def check_method(path: str | Path, wanted: str) -> None:
    """Checks that a packed checkpoint holds the wanted one of MXFP4 and NVFP4.

    Both formats have the same container, so the manifest decides.

    Args:
        path: a packed checkpoint. Without a manifest of this package it counts as NVFP4. One that
            was converted from another library's MXFP4 serves as either.
        wanted: the format that the run wants, ``nvfp4`` or ``mxfp4``.

    Raises:
        CheckpointError: the checkpoint has the other format.
    """
    try:
        method = json.loads((Path(path) / MANIFEST_FILE).read_text(encoding="utf-8")).get("method")
    except (OSError, ValueError, AttributeError):
        method = None
    found = "mxfp4" if method == "mxfp4" else "nvfp4"
    if found != wanted and method != "converted from mxfp4":
        raise CheckpointError(
            f"{path} is packed as {found.upper()}: use +qerl={found}, or give the original model in 16 or 32 bits"
        )


def check_source(path: str | Path) -> None:
    """Checks from its headers that a 16- or 32-bit model folder can be used as it is.

    Raises:
        UnsupportedArchitecture, CheckpointError: as :func:`quantize_checkpoint`; or the checkpoint
            is NVFP4.
    """
    path = Path(path)
    if read_quantization(path) == "nvfp4":
        raise CheckpointError(
            f"{path} is quantized to NVFP4: give the original model in 16 or 32 bits, or use +qerl=nvfp4"
        )
    _check_source(path, get_architecture(read_config(path)), _hf_config(path))


def unused_settings(path: str | Path) -> list[str]:
    """Returns one sentence for each setting of a checkpoint that a run does not use.

    Actor and rollout compute with the same 16-bit keys and values, so a scheme for the KV cache is
    ignored. vLLM would serve an FP8 cache from it
    (vllm/model_executor/layers/attention/attention.py); the actor has none.
    """
    from qerl_verl.nvfp4.convert import modelopt_settings  # convert imports this module

    path = Path(path)
    config = read_config(path)
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    scheme, modelopt = quantization.get("kv_cache_scheme"), modelopt_settings(path) or {}
    kind: str | None
    if isinstance(scheme, dict):
        kind = f"{scheme.get('num_bits', '?')}-bit {scheme.get('type', 'unknown')}"
    elif not (kind := modelopt.get("kv_cache_quant_algo")):
        return []
    return [
        f"kv_cache_scheme ({kind}) of the checkpoint is not used: the KV cache keeps the dtype of the rollout. For "
        "another one set actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_dtype."
    ]


def validate_nvfp4_checkpoint(path: str | Path) -> None:
    """Checks that an NVFP4 checkpoint is complete and sound, from headers, scales, norms and
    biases.

    The checkpoint must hold exactly the tensors of the model, with the right dtypes and shapes. The
    linears of the decoder layers are packed, or in 16 bits where the quantization's ``ignore``
    names them; the experts of a layer are either all packed or all in 16 bits. Scales must be
    positive and finite. The check reads a ninth of the packed bytes, in pieces.

    Raises:
        UnsupportedArchitecture: the model is none of
            :func:`~qerl_verl.nvfp4.architectures.supported_architectures`.
        CheckpointError: names the first file or tensor that is wrong.
    """
    path = Path(path)
    if read_quantization(path) != "nvfp4":
        raise CheckpointError(f"{path} is not quantized. `qerl quantize` makes an NVFP4 checkpoint from it.")
    architecture = get_architecture(read_config(path))
    hf_config = _hf_config(path)
    tensors = read_headers(path)

    unpacked = architecture.tensor_shapes(hf_config)
    packed = {}  # linear -> (N, K)
    for group in architecture.all_groups(hf_config):
        packed |= {linear: unpacked.pop(f"{linear}.weight") for linear in group}
    for linear in _check_plain_linears(path, tensors, packed, architecture, hf_config):
        unpacked[f"{linear}.weight"] = packed.pop(linear)
    _check_tensors(path, tensors, unpacked, WEIGHT_DTYPES)
    for linear, (n, k) in packed.items():
        outputs = {name: ((dtype,), shape) for name, (dtype, shape) in _packed_layout(linear, n, k).items()}
        for name, (dtypes, shape) in outputs.items():
            info = tensors.get(name)
            scalar = name.endswith("_global_scale") and info is not None and info.shape == ()
            _check_tensors(path, tensors, {name: () if scalar else shape}, dtypes)
    names = {name for linear, (n, k) in packed.items() for name in _packed_layout(linear, n, k)}
    _check_names(path, tensors, unpacked.keys() | names, architecture, hf_config.tie_word_embeddings)
    _check_matched(path, packed)
    _check_scales(tensors, packed)
    for name in unpacked:
        if len(tensors[name].shape) == 1:
            _finite_amax(read_tensor(tensors[name]), name, tensors[name])


def _check_plain_linears(
    path: Path,
    tensors: dict[str, TensorInfo],
    linears: dict[str, tuple[int, int]],
    architecture: Architecture,
    hf_config: Any,
) -> set[str]:
    """Returns the linears that an NVFP4 checkpoint leaves in 16 bits.

    Raises:
        CheckpointError: ``ignore`` does not agree with the tensors (vLLM treats a linear as packed
            unless ``ignore`` names it), nothing is packed, or linears that vLLM fuses differ.
    """
    plain = {linear for linear in linears if f"{linear}.weight" in tensors}
    ignore = read_ignore(path)
    for linear in sorted(linears):
        if (linear in plain) != is_ignored(linear, ignore):
            state = (
                "is in 16 bits, but ignore in config.json does not name it"
                if linear in plain
                else "is packed, but ignore in config.json names it"
            )
            raise CheckpointError(f"{path}: {linear} {state}. Export the checkpoint again.")
    if plain == set(linears):
        raise CheckpointError(
            f"{path}: none of its linears is packed. Quantize the original checkpoint with `qerl quantize`."
        )
    check_routers(path, tensors, architecture.routers(hf_config), ignore)
    for group in fused_linears(architecture, hf_config):
        if 0 < len(plain.intersection(group)) < len(group):
            raise CheckpointError(
                f"{path}: of {name_group(group)} some are packed and some are not, but vLLM fuses them. Quantize the original "
                "checkpoint with `qerl quantize`."
            )
    return plain


def fused_linears(architecture: Architecture, hf_config: Any) -> Iterator[tuple[str, ...]]:
    """Yields the full names of the linears that vLLM computes as one layer.

    These are fused projections, and all experts of a layer. They must be all packed or all plain.
    """
    for i in range(decoder_layers(hf_config)):
        prefix, of_experts, experts = f"{architecture.layer_prefix}{i}.", [], architecture.experts
        for group in architecture.layer_groups(hf_config, i):
            if experts is not None and group[0].startswith(f"{experts.module}."):
                of_experts += group
            else:
                yield tuple(prefix + linear for linear in group)
        if of_experts:
            yield tuple(prefix + linear for linear in of_experts)


def name_group(group: tuple[str, ...]) -> str:
    """Returns the names of linears that vLLM fuses as text for a message."""
    return ", ".join(group) if len(group) <= 3 else f"the {len(group)} linears {group[0]} to {group[-1]}"


def check_routers(
    path: Path, tensors: Mapping[str, TensorInfo], routers: Iterable[str], ignore: Iterable[str] | None = None
) -> None:
    """Refuses a quantized router, and one that vLLM would treat as packed.

    Args:
        path: for messages.
        tensors: the tensors of a quantized checkpoint.
        routers: full names.
        ignore: the quantization's ``ignore``; None where the format does not use it.

    Raises:
        CheckpointError: names the router.
    """
    for router in routers:
        parts = (f"{router}.weight_packed", f"{router}.weight_scale")
        if part := next((part for part in parts if part in tensors), None):
            raise CheckpointError(
                f"{tensors[part].file}: {part}: the router of the experts is quantized, but it stays in 16 bits here. Quantize "
                "the original checkpoint with `qerl quantize`, or export it again with re:.*mlp.gate$ among the ignored modules."
            )
        if ignore is not None and not is_ignored(router, ignore):
            raise CheckpointError(
                f"{path}: the router {router} is in 16 bits, but ignore in config.json does not name it. Export the checkpoint "
                "again with re:.*mlp.gate$ among the ignored modules."
            )


def is_ignored(linear: str, ignore: Iterable[str]) -> bool:
    """Returns whether compressed-tensors leaves a linear in 16 bits.

    Args:
        linear: its full name.
        ignore: the quantization's ``ignore``: names, or regular expressions after ``re:``.
    """
    return any(re.match(i.removeprefix("re:"), linear) if i.startswith("re:") else i == linear for i in ignore)


def read_ignore(path: Path) -> list[str]:
    """Returns ``ignore`` of a checkpoint's quantization, with transformers' names; empty without
    one."""
    config = read_config(path)
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    module_name = get_architecture(config).module_name
    return [i if i.startswith("re:") else module_name(i) for i in quantization.get("ignore") or []]


def read_config(path: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
        CheckpointError: the folder or the file is missing, or the file is not a JSON object.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder.")
    if not (path / CONFIG_FILE).exists() and (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} holds a PEFT adapter but no model. Give the adapter's base model, and this folder as lora_adapter_path."
        )
    return _read_json(path / CONFIG_FILE, "This is not the folder of a Hugging Face model.")


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Returns name -> location of every tensor of a checkpoint, in the order of the files.

    Names are those of transformers' model, also where the files have older names
    (:attr:`~qerl_verl.nvfp4.architectures.Architecture.older_names`).

    Raises:
        CheckpointError: there are no safetensors, a shard of the index is missing, or a file is
            damaged.
    """
    weights = _weight_files(path)
    tensors = {}
    for file in sorted(set(weights)):
        if not (path / file).exists():
            raise CheckpointError(f"{path / file}: missing, but {INDEX_FILE} names it. Fetch it again.")
        tensors |= read_header(path / file)
    for file, names in weights.items():
        for name in names:
            if name not in tensors:
                raise CheckpointError(f"{path / file}: tensor {name}, which {INDEX_FILE} places there, is missing.")
    try:
        architecture = get_architecture(read_config(path))
    except UnsupportedArchitecture:  # reported where the model is requested
        return tensors
    return {architecture.module_name(name): info for name, info in tensors.items()}


def _weight_files(path: Path) -> dict[str, list[str]]:
    """Returns file name -> the tensors that the index places there."""
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if not index.exists():
        if single.exists():
            return {SINGLE_FILE: []}
        if any(file.name.endswith(PICKLES) for file in path.iterdir()):
            raise CheckpointError(f"{path} {PICKLES_ALONE}")
        raise CheckpointError(f"{path} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there.")
    weight_map = _read_json(index, "Fetch it again.").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no weight_map. Fetch it again.")
    files = {}
    for name, file in weight_map.items():
        files.setdefault(file, []).append(name)
    # transformers would load one of the two models, vLLM the other
    if single.exists() and SINGLE_FILE not in files:
        raise CheckpointError(
            f"{path} holds two models, {SINGLE_FILE} and what {INDEX_FILE} lists: give each a folder of its own."
        )
    return files


def _is_weight(name: str) -> bool:
    return any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in _WEIGHT_FILES)


def source_files(path: Path) -> list[str]:
    """Returns the files of a checkpoint, relative to it: safetensors and visible files without
    weights."""
    weights = _weight_files(path)
    files = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
    names = (file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    return [name for name in names if name in weights or not _is_weight(name)]


@dataclass(frozen=True)
class _Unit:
    """One unit of reading: a tensor that is copied, or linears that share a global scale."""

    sources: tuple[str, ...]
    layout: dict[str, tuple[str, tuple[int, ...]]]  # output name -> (dtype, shape)
    quantize: bool

    @property
    def output_bytes(self) -> int:
        return sum(nbytes(dtype, shape) for dtype, shape in self.layout.values())


def _plan(tensors: dict[str, TensorInfo], architecture: Architecture, hf_config: Any) -> list[_Unit]:
    group_of = {linear: group for group in architecture.all_groups(hf_config) for linear in group}
    units, done = [], set()
    for name, info in tensors.items():
        linear = name.removesuffix(".weight")
        if is_unused(name):
            continue
        if linear not in group_of:
            dtype = "BF16" if info.dtype == "F32" else info.dtype
            units.append(_Unit((name,), {name: (dtype, info.shape)}, quantize=False))
        elif linear not in done:
            group = group_of[linear]
            layout = {}
            for member in group:
                n, k = tensors[f"{member}.weight"].shape
                if k % BLOCK_SIZE:
                    raise CheckpointError(
                        f"{tensors[f'{member}.weight'].file}: {member}.weight has {k} input channels. NVFP4 needs a "
                        f"multiple of {BLOCK_SIZE}, so this model cannot be quantized."
                    )
                layout |= _packed_layout(member, n, k)
            units.append(_Unit(tuple(f"{member}.weight" for member in group), layout, quantize=True))
            done.update(group)
    return units


def _packed_layout(linear: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        f"{linear}.weight_global_scale": ("F32", (1,)),
        f"{linear}.weight_packed": ("U8", (n, k // 2)),
        f"{linear}.weight_scale": ("F8_E4M3", (n, k // BLOCK_SIZE)),
    }


def _write_weights(
    dst: Path,
    tensors: dict[str, TensorInfo],
    units: list[_Unit],
    max_shard_bytes: int,
    progress: bool,
    packer: _Rounder | _Finished,
) -> dict[str, FileRecord]:
    shards: list[list[_Unit]] = [[]]
    size = 0
    for unit in units:
        if shards[-1] and size + unit.output_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += unit.output_bytes

    records, weight_map = {}, {}
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE_FILE]
    bar = tqdm(
        total=sum(info.nbytes for info in tensors.values()),
        desc=packer.title,
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
    coming = [unit.sources for unit in units if unit.quantize]
    with bar, _worker_pool() as pool, packer:
        for name, shard in zip(names, shards, strict=True):
            layout = {output: entry for unit in shard for output, entry in unit.layout.items()}
            with ShardWriter(dst / name, layout) as writer:
                for unit in shard:
                    if unit.quantize:
                        packer.begin(tensors, coming[:2])
                        _write_packed(writer, tensors, unit, pool, packer)
                        del coming[0]
                    else:
                        _write_copied(writer, tensors, unit)
                    bar.update(sum(tensors[source].nbytes for source in unit.sources))
            records[name] = writer.record
            weight_map |= dict.fromkeys(layout, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(unit.output_bytes for unit in units)}, "weight_map": weight_map}
        records[INDEX_FILE] = _write_json(dst / INDEX_FILE, index)
    return records


@contextlib.contextmanager
def _worker_pool() -> Iterator[ThreadPoolExecutor]:
    """Yields a pool of as many threads as torch would use, each running torch operators alone.

    Torch's own threads spin at a barrier after each operator. Where another process competes for
    the cores (Ray during its start, for example), that made quantization ten times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _write_packed(
    writer: ShardWriter,
    tensors: dict[str, TensorInfo],
    unit: _Unit,
    pool: ThreadPoolExecutor,
    packer: _Rounder | _Finished,
) -> None:
    for linear, packed in packer.pack(tensors, unit.sources, pool):
        for name, tensor in tensors_of({linear: packed}).items():
            writer.write_tensor(name, [tensor])


class _Rounder:
    """Gives the writer packed linears, by a method that needs only their weights.

    Attributes:
        errors: full name of each linear packed so far -> its error.
    """

    def __init__(self, method: str, device: torch.device):
        self.title = "Quantizing to MXFP4" if method == "mxfp4" else f"Quantizing to NVFP4 ({method})"
        self.errors: dict[str, SquaredError] = {}
        self._method, self._device = method, device
        self._reader = ThreadPoolExecutor(1)
        self._weights: dict[tuple[str, ...], Future[dict[str, torch.Tensor]]] = {}

    def __enter__(self) -> _Rounder:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def begin(self, tensors: dict[str, TensorInfo], coming: list[tuple[str, ...]]) -> None:
        """Starts to read the weights of the next units in a thread, except for a CPU.

        There the units at hand need the cores and the memory.
        """
        for sources in coming if self._device.type != "cpu" else ():
            if sources not in self._weights:
                self._weights[sources] = self._reader.submit(self._read, tensors, sources)

    def _read(self, tensors: dict[str, TensorInfo], sources: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {name: read_tensor(tensors[name]).to(self._device) for name in sources}

    def pack(
        self, tensors: dict[str, TensorInfo], sources: tuple[str, ...], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[str, PackedLinear]]:
        """Yields full name and tensors of linears that share a global scale, one by one.

        Args:
            tensors: the tensors of the source.
            sources: the names of their weights.
            pool: threads for the work on a CPU.
        """
        ahead = self._weights.pop(sources, None)
        weights = ahead.result() if ahead else self._read(tensors, sources)
        amax = [_finite_amax(weight, name, tensors[name]) for name, weight in weights.items()]
        if self._method == "mxfp4":
            _check_exponents(weights, tensors)
        global_scale = shared_global_scale(amax, self._method)
        for name in sources:
            packed = round_weight(
                weights.pop(name), global_scale, self._method, pool if self._device.type == "cpu" else None
            )
            linear = name.removesuffix(".weight")
            self.errors[linear] = packed.error
            yield linear, packed


def _check_exponents(weights: dict[str, torch.Tensor], tensors: dict[str, TensorInfo]) -> None:
    """Refuses fused linears whose MXFP4 exponents span more than NVFP4's container holds.

    Raises:
        CheckpointError: names the tensor.
    """
    lowest, highest = {}, []
    for name, weight in weights.items():
        if weight.shape[1] % MX_BLOCK_SIZE:
            raise CheckpointError(
                f"{tensors[name].file}: {name} has {weight.shape[1]} input channels. MXFP4 needs a multiple of "
                f"{MX_BLOCK_SIZE}: use +qerl=nvfp4 for this model."
            )
        exponents = mxfp4_exponents(weight)
        exponents = exponents[exponents != NO_EXPONENT]
        if exponents.numel():
            lowest[name] = exponents.min().item()
            highest.append(exponents.max().item())
    for name, low in lowest.items():
        if max(highest) - low > LARGEST_SPAN:
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name}: the shared exponents of its blocks of {MX_BLOCK_SIZE} go down to {low}, and "
                f"up to {max(highest)} with the linears that it is fused with. That is a span of {max(highest) - low}, and the "
                f"container of NVFP4 holds {LARGEST_SPAN}, the powers of two of E4M3: use +qerl=nvfp4 for this model."
            )


class _Finished:
    """Gives the writer the linears that GPTQ has finished."""

    title = "Writing the checkpoint"

    def __init__(self, finished: FinishedLayers):
        self.errors = finished.errors
        self._finished = finished

    def __enter__(self) -> _Finished:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def begin(self, tensors: dict[str, TensorInfo], coming: list[tuple[str, ...]]) -> None:
        """Does nothing: :meth:`FinishedLayers.linear` reads a layer at once."""

    def pack(
        self, tensors: dict[str, TensorInfo], sources: tuple[str, ...], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[str, PackedLinear]]:
        for name in sources:
            linear = name.removesuffix(".weight")
            yield linear, self._finished.linear(linear)


def _write_copied(writer: ShardWriter, tensors: dict[str, TensorInfo], unit: _Unit) -> None:
    (name,) = unit.sources
    info, (dtype, _) = tensors[name], unit.layout[name]

    def pieces() -> Iterator[torch.Tensor]:
        for piece in read_pieces(info):
            if info.dtype in WEIGHT_DTYPES:
                _finite_amax(piece, name, info)
            yield piece if dtype == info.dtype else piece.bfloat16()

    writer.write_tensor(name, pieces())


def _finite_amax(tensor: torch.Tensor, name: str, info: TensorInfo) -> torch.Tensor:
    amax = torch.stack(torch.aminmax(tensor)).float().abs().max()
    if not torch.isfinite(amax):
        raise CheckpointError(f"{info.file}: tensor {name} holds NaN or Inf. Fetch or export the checkpoint again.")
    return amax


def _check_source(path: Path, architecture: Architecture, hf_config: Any) -> dict[str, TensorInfo]:
    """Returns the headers of a 16- or 32-bit checkpoint.

    Raises:
        CheckpointError: the checkpoint does not hold exactly the tensors of its model.
    """
    tensors = split_experts(read_headers(path), architecture, hf_config)
    shapes = architecture.tensor_shapes(hf_config)
    _check_tensors(path, tensors, shapes, WEIGHT_DTYPES)
    _check_names(path, tensors, shapes.keys(), architecture, hf_config.tie_word_embeddings)
    return tensors


def split_experts(tensors: dict[str, TensorInfo], architecture: Architecture, hf_config: Any) -> dict[str, TensorInfo]:
    """Returns the tensors of a 16- or 32-bit checkpoint with one matrix per linear of an expert.

    A checkpoint may stack the experts of a layer (``gate_up_proj`` ``[E, 2 I, H]``, ``down_proj``
    ``[E, H, I]``). The matrices of one expert are contiguous there, so they are regions of the same
    files.

    Raises:
        CheckpointError: a stack has another shape.
    """
    if architecture.experts is None:
        return tensors
    stacks, linears = architecture.experts.stacked_shapes(hf_config), list(architecture.experts.linears(hf_config))
    out = {}
    for name, info in tensors.items():
        stack = next((stack for stack in stacks if name.endswith(f".{stack}")), None)
        if stack is None:
            out[name] = info
            continue
        if info.shape != stacks[stack]:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json says {list(stacks[stack])}."
            )
        prefix, offset = name.removesuffix(stack), info.offset
        for gate, up, down in linears:
            parts = (gate, up) if stack.endswith("gate_up_proj") else (down,)
            shape = info.shape[1] // len(parts), info.shape[2]
            for part in parts:
                out[f"{prefix}{part}.weight"] = TensorInfo(info.file, offset, info.dtype, shape)
                offset += nbytes(info.dtype, shape)
    return out


def _check_names(
    path: Path, tensors: dict[str, TensorInfo], expected: Set[str], architecture: Architecture, tied: bool
) -> None:
    """Refuses tensors that the model does not have, which would be lost or stop the actor."""
    unexpected = [name for name in tensors if name not in expected and not is_unused(name)]
    if tied and "lm_head.weight" in unexpected:
        _check_tied(tensors["lm_head.weight"], tensors[architecture.embeddings], architecture.embeddings)
        unexpected.remove("lm_head.weight")
    if unexpected:
        raise CheckpointError(
            f"{path}: {len(unexpected)} of {len(tensors)} tensors are none of the model that config.json describes: "
            f"{', '.join(unexpected[:4])}{', ...' if len(unexpected) > 4 else ''}. Give the plain language model: save it "
            "without what was added for training, as a value head, or correct config.json."
        )


def _check_tied(head: TensorInfo, embeddings: TensorInfo, name: str) -> None:
    """Refuses an output layer that differs from the embeddings where config.json ties the two.

    vLLM and the actor then use the embeddings as output layer; transformers does not when they
    differ (modeling_utils.py, tie_weights).
    """
    same = head.shape == embeddings.shape and head.dtype == embeddings.dtype
    if not same or not all(map(torch.equal, read_pieces(head), read_pieces(embeddings))):
        raise CheckpointError(
            f"{head.file}: lm_head.weight differs from {name}, but config.json says "
            "tie_word_embeddings: true. Set it to false, or remove lm_head.weight."
        )


def _check_matched(path: Path, linears: Iterable[str]) -> None:
    """Refuses a config.json with which vLLM would build a packed linear without NVFP4.

    The actor goes by the tensors alone. vLLM decides in its compressed_tensors/utils.py
    (should_ignore_layer, find_matched_target).
    """
    config = read_config(path)
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    ignore = read_ignore(path)
    targets = [
        target for group in quantization.get("config_groups", {}).values() for target in group.get("targets") or ()
    ]
    for linear in linears:
        ignored = next((i for i in ignore if _names(i, linear)), None)
        if ignored is not None or not any(target == "Linear" or _names(target, linear) for target in targets):
            why = (
                f"its ignore list has {ignored}"
                if ignored
                else f"its config_groups have the targets {', '.join(targets)}"
            )
            raise CheckpointError(
                f"{path / CONFIG_FILE}: {linear} is packed, but quantization_config leaves it out: {why}. Fetch or export the "
                "checkpoint again."
            )


def _names(pattern: str, linear: str) -> bool:
    """Returns whether compressed-tensors' ``name`` or ``re:expression`` matches a linear."""
    expression = pattern.removeprefix("re:")
    return re.match(expression, linear) is not None if expression != pattern else pattern == linear


def _check_scales(tensors: dict[str, TensorInfo], linears: Iterable[str]) -> None:
    """Refuses scales that decode to NaN or Inf, or that some kernel reads differently."""
    scales = {f"{linear}.weight_scale": tensors[f"{linear}.weight_scale"] for linear in linears}
    size = sum(info.nbytes for info in scales.values())
    show = size > _ANNOUNCED_SCALES
    with tqdm(total=size, desc="Checking NVFP4 scales", unit="B", unit_scale=True, disable=not show) as bar:
        for name, info in scales.items():
            global_name = name.replace(".weight_scale", ".weight_global_scale")
            value = read_tensor(tensors[global_name]).item()
            if not _SMALLEST <= value <= _LARGEST:  # also false for NaN
                raise CheckpointError(
                    f"{tensors[global_name].file}: tensor {global_name} is {value:g}; it divides the weight, so it has to be "
                    "a positive, finite number. Fetch or export the checkpoint again."
                )
            for piece in read_pieces(info):
                codes = piece.view(torch.uint8)
                if (
                    codes.max() >= _NAN_SCALE
                    and (bad := codes[(codes >= _NAN_SCALE) & (codes != _NEGATIVE_ZERO)]).numel()
                ):
                    nan = int(((bad & 0x7F) == _NAN_SCALE).sum())
                    raise CheckpointError(
                        f"{info.file}: tensor {name} holds {nan} NaN and {bad.numel() - nan} negative scales in one "
                        f"piece of {codes.numel()}. Fetch or export the checkpoint again."
                    )
            bar.update(info.nbytes)


def _check_tensors(
    path: Path, tensors: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]], dtypes: tuple[str, ...]
) -> None:
    for name, shape in shapes.items():
        info = tensors.get(name)
        if info is None:
            raise CheckpointError(f"{path}: tensor {name} is missing. Its config.json describes a model that has it.")
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json says {list(shape)}."
            )
        if info.dtype not in dtypes:
            raise CheckpointError(f"{info.file}: tensor {name} is {info.dtype}, expected {' or '.join(dtypes)}.")


def _other_quantization(path: Path, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: quantized already, as {kind}. A run uses {FORMAT} checkpoints as they are and converts ModelOpt's NVFP4 and "
        "compressed-tensors' MXFP4; otherwise give the original checkpoint in 16 or 32 bits."
    )


def _check_space(dst: Path, needed: int) -> None:
    parent = next(folder for folder in (dst, *dst.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{dst}: needs {_gb(needed)}, but {_gb(free)} are free on its disk. Make room or choose another disk."
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def decoder_layers(hf_config: Any) -> int:
    """Returns the number of a model's decoder layers.

    Args:
        hf_config: transformers' configuration of the model.
    """
    return hf_config.get_text_config().num_hidden_layers


def _hf_config(path: Path) -> Any:
    from transformers import AutoConfig  # slow to import, rarely needed

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises many types for a bad config.json
        raise CheckpointError(f"{path / CONFIG_FILE}: transformers cannot read it: {error}") from error


def _copy(src: Path, dst: Path) -> FileRecord:
    dst.parent.mkdir(parents=True, exist_ok=True)
    with src.open("rb") as source, HashedFile(dst) as file:
        while data := source.read(1 << 20):
            file.write(data)
    return file.record


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file. {fix}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). {fix}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object. {fix}")
    return value


def _write_json(path: Path, value: dict[str, Any]) -> FileRecord:
    with HashedFile(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
    return file.record
