"""Decides whether a model folder can be used, and how, before anything is written or started."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from qerl_verl.nvfp4.architectures import Architecture, get_architecture
from qerl_verl.nvfp4.checkpoint_files import load_hf_config, read_config, read_headers
from qerl_verl.nvfp4.convert import check_foreign, foreign_format, modelopt_settings
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import WEIGHT_DTYPES, is_ignored, packed_layout, read_ignore, read_quantization
from qerl_verl.nvfp4.manifest import read_method
from qerl_verl.nvfp4.model_shapes import fused_linears, name_group
from qerl_verl.nvfp4.packing import plan_units
from qerl_verl.nvfp4.safetensors_stream import TensorInfo, read_tensor
from qerl_verl.nvfp4.tensor_checks import (
    check_matched,
    check_names,
    check_plain_linears,
    check_scales,
    check_source_tensors,
    check_tensors,
    finite_amax,
)


def check_checkpoint(path: str | Path) -> Literal["none", "nvfp4", "modelopt", "mxfp4"]:
    """Checks that a model folder can be used: as it is, quantized, or converted. Writes nothing.

    Reads the headers of a 16- or 32-bit checkpoint, and also the scales of an NVFP4 checkpoint.

    Returns:
        As :func:`read_quantization`, or a format that :mod:`qerl_verl.nvfp4.convert` converts.

    Raises:
        UnsupportedArchitecture, CheckpointError: as
            :func:`~qerl_verl.nvfp4.quantize.quantize_checkpoint` or
            :func:`validate_nvfp4_checkpoint`.
    """
    path = Path(path)
    if foreign := foreign_format(path):
        check_foreign(path)
        return foreign
    kind = read_quantization(path)
    if kind == "nvfp4":
        validate_nvfp4_checkpoint(path)
    else:
        architecture, hf_config = get_architecture(read_config(path)), load_hf_config(path)
        plan_units(check_source_tensors(path, architecture, hf_config), architecture, hf_config)
    return kind


def check_source(path: str | Path) -> None:
    """Checks from its headers that a 16- or 32-bit model folder can be used as it is.

    Raises:
        UnsupportedArchitecture, CheckpointError: as
            :func:`~qerl_verl.nvfp4.quantize.quantize_checkpoint`; or the checkpoint is NVFP4.
    """
    path = Path(path)
    if read_quantization(path) == "nvfp4":
        raise CheckpointError(
            f"{path} is quantized to NVFP4: give the original model in 16 or 32 bits, or use +qerl=nvfp4"
        )
    check_source_tensors(path, get_architecture(read_config(path)), load_hf_config(path))


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
    method = read_method(Path(path))
    found = "mxfp4" if method == "mxfp4" else "nvfp4"
    if found != wanted and method != "converted from mxfp4":
        raise CheckpointError(
            f"{path} is packed as {found.upper()}: use +qerl={found}, or give the original model in 16 or 32 bits"
        )


def unused_settings(path: str | Path) -> list[str]:
    """Returns one sentence for each setting of a checkpoint that a run does not use.

    Actor and rollout compute with the same 16-bit keys and values, so a scheme for the KV cache is
    ignored. vLLM would serve an FP8 cache from it
    (vllm/model_executor/layers/attention/attention.py); the actor has none.
    """
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
        f"kv_cache_scheme ({kind}) of the checkpoint is not used: the KV cache keeps the dtype of "
        "the rollout. For another one set "
        "actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_dtype."
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
    hf_config = load_hf_config(path)
    tensors = read_headers(path)

    unpacked = architecture.tensor_shapes(hf_config)
    packed = {}  # linear -> (N, K)
    for group in architecture.all_groups(hf_config):
        packed |= {linear: unpacked.pop(f"{linear}.weight") for linear in group}
    for linear in _check_plain_linears(path, tensors, packed, architecture, hf_config):
        unpacked[f"{linear}.weight"] = packed.pop(linear)
    check_tensors(path, tensors, unpacked, WEIGHT_DTYPES)
    for linear, (n, k) in packed.items():
        outputs = {name: ((dtype,), shape) for name, (dtype, shape) in packed_layout(linear, n, k).items()}
        for name, (dtypes, shape) in outputs.items():
            info = tensors.get(name)
            scalar = name.endswith("_global_scale") and info is not None and info.shape == ()
            check_tensors(path, tensors, {name: () if scalar else shape}, dtypes)
    names = {name for linear, (n, k) in packed.items() for name in packed_layout(linear, n, k)}
    check_names(path, tensors, unpacked.keys() | names, architecture, hf_config.tie_word_embeddings)
    check_matched(path, packed)
    check_scales(tensors, packed)
    for name in unpacked:
        if len(tensors[name].shape) == 1:
            finite_amax(read_tensor(tensors[name]), name, tensors[name])


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
    check_plain_linears(path, tensors, architecture.plain_linears(hf_config), ignore)
    for group in fused_linears(architecture, hf_config):
        if 0 < len(plain.intersection(group)) < len(group):
            raise CheckpointError(
                f"{path}: of {name_group(group)} some are packed and some are not, but vLLM fuses "
                "them. Quantize the original checkpoint with `qerl quantize`."
            )
    return plain
