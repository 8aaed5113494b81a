"""Reads every byte of an NVFP4 folder once, for ``qerl quantize --check``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.nvfp4.checkpoint_files import read_headers
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import WEIGHT_DTYPES
from qerl_verl.nvfp4.manifest import MANIFEST_FILE, check_files
from qerl_verl.nvfp4.safetensors_stream import TensorInfo, read_pieces, read_tensor
from qerl_verl.nvfp4.validation import validate_nvfp4_checkpoint


def verify_checkpoint(path: str | Path, *, progress: bool = True) -> dict[str, int]:
    """Checks an NVFP4 folder as thoroughly as is possible without its source model.

    - :func:`~qerl_verl.nvfp4.validation.validate_nvfp4_checkpoint` checks names, shapes, dtypes and
      scales.
    - Each packed linear must decode to finite bfloat16 values, and no block may have a zero scale
      with codes that are not zero.
    - Every tensor that is not packed must be finite.
    - Sizes and SHA-256 hashes must agree with the manifest, if `qerl quantize` wrote one.

    Args:
        path: the folder.
        progress: show a progress bar on stderr.

    Returns:
        The numbers of checked ``linears``, of ``weights`` in them, of ``other tensors``, and of
        ``files`` in the manifest.

    Raises:
        UnsupportedArchitecture, CheckpointError: names the first file or tensor that is wrong.
    """
    path = Path(path)
    validate_nvfp4_checkpoint(path)
    tensors = read_headers(path)
    linears = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    parts = ("weight_packed", "weight_scale", "weight_global_scale")
    others = [name for name in tensors if not name.endswith(parts)]
    weights = 0
    interval = 0.2 if sys.stderr.isatty() else 30
    size = sum(info.nbytes for info in tensors.values())
    with tqdm(
        total=size, desc="Checking", unit="B", unit_scale=True, disable=not progress, mininterval=interval
    ) as bar:
        for linear in linears:
            names = [f"{linear}.{part}" for part in parts]
            packed, scale, global_scale = (read_tensor(tensors[name]) for name in names)
            _check_decoded(linear, tensors[names[0]], packed, scale, global_scale)
            weights += 2 * packed.numel()
            bar.update(sum(tensors[name].nbytes for name in names))
        for name in others:
            for piece in read_pieces(tensors[name]):
                if tensors[name].dtype in WEIGHT_DTYPES and not torch.isfinite(piece).all():
                    raise CheckpointError(f"{tensors[name].file}: tensor {name} holds NaN or Inf. Export it again.")
            bar.update(tensors[name].nbytes)
    return {
        "linears": len(linears),
        "weights": weights,
        "other tensors": len(others),
        "files": check_files(path, progress=progress) if (path / MANIFEST_FILE).exists() else 0,
    }


def _check_decoded(
    linear: str, info: TensorInfo, packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor
) -> None:
    zero_blocks = scale.view(torch.uint8) & 0x7F == 0
    rows = max(1, (1 << 22) // packed.shape[1])
    for p, s, z in zip(packed.split(rows), scale.split(rows), zero_blocks.split(rows), strict=True):
        values = dequantize_nvfp4(p, s, global_scale, torch.bfloat16)
        if not torch.isfinite(values).all():
            raise CheckpointError(f"{info.file}: {linear} decodes to NaN or Inf. Fetch or export the checkpoint again.")
        codes = (p & 0x77 != 0).view(len(p), -1, 8).any(-1)  # ignores the sign of a zero
        if lost := int((codes & z).sum()):
            raise CheckpointError(
                f"{info.file}: {linear} has {lost} blocks of 16 whose scale is zero and whose "
                "codes are not: their weights are lost. Quantize the original checkpoint again."
            )
