"""Quantizes a 16- or 32-bit Hugging Face checkpoint to NVFP4.

Each linear ``X`` of the decoder layers becomes ``X.weight_packed``, ``X.weight_scale`` and
``X.weight_global_scale`` (:mod:`qerl_verl.nvfp4.format`); all other tensors are in 16 bits. vLLM
and transformers load such a folder as it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.atomic_folder import atomic_folder, settle_leftovers
from qerl_verl.nvfp4.calibration import Calibration
from qerl_verl.nvfp4.checkpoint_files import (
    CONFIG_FILE,
    as_gigabytes,
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
from qerl_verl.nvfp4.format import FORMAT_VERSION, QUANTIZATION_CONFIG, read_quantization
from qerl_verl.nvfp4.gptq import GPTQ_VERSION
from qerl_verl.nvfp4.layerwise import FinishedLayers, compare_checkpoints, gptq_layers
from qerl_verl.nvfp4.manifest import MANIFEST_FILE, read_records, write_manifest
from qerl_verl.nvfp4.packing import Finished, Rounder, plan_units, write_weights
from qerl_verl.nvfp4.quantizers import METHODS, NEEDS_CALIBRATION
from qerl_verl.nvfp4.report import REPORT_FILE, build_report
from qerl_verl.nvfp4.safetensors_stream import FileRecord, TensorInfo
from qerl_verl.nvfp4.tensor_checks import check_source_tensors


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
                f"{dst} exists and is not an empty folder: choose another one. --force replaces a "
                "checkpoint that `qerl quantize` wrote."
            )
        _check_replaceable(src, dst)
    config = read_config(src)
    architecture = get_architecture(config)
    hf_config = load_hf_config(src)
    tensors = check_source_tensors(src, architecture, hf_config)
    units = plan_units(tensors, architecture, hf_config)
    ours = (CONFIG_FILE, MANIFEST_FILE, REPORT_FILE)
    others = [name for name in source_files(src) if name not in ours and not is_weight_file(name)]

    written = sum(unit.output_bytes for unit in units) + sum((src / name).stat().st_size for name in others)
    finished = None
    if method == "gptq" and calibration is not None:
        finished = FinishedLayers(dst, _attempt_key(src, tensors, calibration))
        written += max(0, sum(unit.output_bytes for unit in units if unit.quantize) - finished.nbytes)
    check_space(dst, written)
    ignored = [*architecture.plain_modules, *architecture.routers(hf_config)]
    config["quantization_config"] = QUANTIZATION_CONFIG | {"ignore": ignored}
    dtype = "float16" if tensors[architecture.embeddings].dtype == "F16" else "bfloat16"
    _set_dtype(config, dtype)

    try:
        packer: Rounder | Finished = Rounder(method, device)
        if finished is not None and calibration is not None:
            packer = Finished(gptq_layers(hf_config, tensors, calibration, finished, device, progress))
        with atomic_folder(dst, replace=replace) as folder:
            records = write_weights(folder, tensors, units, max_shard_bytes, progress, packer)
            for name in others:
                records[name] = copy_file(src / name, folder / name)
            records[CONFIG_FILE] = write_json(folder / CONFIG_FILE, config)
            text = None
            if calibration is not None:
                packed = read_headers(folder)
                text = compare_checkpoints(hf_config, tensors, packed, calibration.held_out, device, progress)
            report = build_report(method, packer.errors, architecture.layer_prefix, calibration, text)
            records[REPORT_FILE] = write_json(folder / REPORT_FILE, report)
            described = calibration.describe() if calibration else None
            write_manifest(folder, src, method, records, calibration=described)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{dst}: the disk (or the quota) was full before all of the "
                f"{as_gigabytes(written)} were written. The incomplete folder is "
                f"removed{finished.kept if finished else ''}. Free some space, or choose a folder "
                "on another disk."
            ) from error
        raise
    except torch.OutOfMemoryError as error:
        raise CheckpointError(
            f"{dst}: {device} has too little free memory for {method} ({error}). Free some, or "
            "choose another device or method (four-over-six needs the "
            f"least){finished.kept if finished else ''}."
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
        ours = {MANIFEST_FILE, *read_records(dst)}
    except CheckpointError:
        why = why or f"it has no readable {MANIFEST_FILE}, so `qerl quantize` did not write it"
    else:
        files = sorted(str(path.relative_to(dst)) for path in dst.rglob("*") if not path.is_dir() or path.is_symlink())
        others = [name for name in files if name not in ours]
        if others and not why:
            why = f"it also holds {others[0]}, which `qerl quantize` did not write"
    if why:
        raise CheckpointError(f"{dst}: --force does not replace this folder, because {why}. Choose another DST.")
