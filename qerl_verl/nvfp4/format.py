"""Defines the format ``nvfp4-pack-quantized`` in config.json and in the tensors of a checkpoint.

compressed-tensors 0.17 defines the format. Its preset ``NVFP4A16``
(``compressed_tensors/quantization/quant_scheme.py``) quantizes weights only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.checkpoint_files import read_config
from qerl_verl.nvfp4.errors import CheckpointError

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

WEIGHT_DTYPES = ("F32", "BF16", "F16")
"""The dtypes of tensors that are not packed, as safetensors names them."""


def packed_layout(linear: str, n: int, k: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns name -> (dtype as in safetensors, shape) of the tensors of a packed linear ``[n,
    k]``."""
    return {
        f"{linear}.weight_global_scale": ("F32", (1,)),
        f"{linear}.weight_packed": ("U8", (n, k // 2)),
        f"{linear}.weight_scale": ("F8_E4M3", (n, k // BLOCK_SIZE)),
    }


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


def _other_quantization(path: Path, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: quantized already, as {kind}. A run uses {FORMAT} checkpoints as they are and "
        "converts ModelOpt's NVFP4 and compressed-tensors' MXFP4; otherwise give the original "
        "checkpoint in 16 or 32 bits."
    )


def read_ignore(path: Path) -> list[str]:
    """Returns ``ignore`` of a checkpoint's quantization, with transformers' names; empty without
    one."""
    config = read_config(path)
    quantization = config.get("quantization_config") or config.get("compression_config") or {}
    module_name = get_architecture(config).module_name
    return [i if i.startswith("re:") else module_name(i) for i in quantization.get("ignore") or []]


def is_ignored(linear: str, ignore: Iterable[str]) -> bool:
    """Returns whether compressed-tensors leaves a linear in 16 bits.

    Args:
        linear: its full name.
        ignore: the quantization's ``ignore``: names, or regular expressions after ``re:``.
    """
    return any(matches(pattern, linear) for pattern in ignore)


def matches(pattern: str, linear: str) -> bool:
    """Returns whether compressed-tensors' ``name`` or ``re:expression`` matches a linear."""
    expression = pattern.removeprefix("re:")
    return re.match(expression, linear) is not None if expression != pattern else pattern == linear
