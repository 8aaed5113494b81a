"""Writes the tensors of a checkpoint into safetensors files of bounded size, unit by unit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from qerl_verl.nvfp4.safetensors_stream import FileRecord, HashedFile, ShardWriter, nbytes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a tensor -> (dtype as in safetensors, shape)."""

Unit = TypeVar("Unit")


def write_shards(
    folder: Path,
    units: Iterable[tuple[Layout, Unit]],
    tensors_of: Callable[[Unit], Iterator[tuple[str, torch.Tensor]]],
    *,
    title: str,
    progress: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, FileRecord]:
    """Writes units into ``model.safetensors``, or into several files and their index.

    Args:
        folder: an existing folder that holds none of these files.
        units: the layout of each unit, and the object from which ``tensors_of`` makes its tensors.
        tensors_of: yields name and tensor of a unit, in the order of its layout.
        title: text of the progress bar.
        progress: show the bar on stderr.
        max_shard_bytes: size in bytes above which another file is begun.

    Returns:
        File name -> size and SHA-256.
    """
    shards: list[list[tuple[Layout, Unit]]] = [[]]
    size = total = 0
    for layout, unit in units:
        length = sum(nbytes(*entry) for entry in layout.values())
        if shards[-1] and size + length > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((layout, unit))
        size, total = size + length, total + length
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE_FILE]
    records, weight_map = {}, {}
    bar = tqdm(
        total=total,
        desc=title,
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
    with bar:
        for name, shard in zip(names, shards, strict=True):
            whole = {output: entry for layout, _ in shard for output, entry in layout.items()}
            weight_map |= dict.fromkeys(whole, name)
            with ShardWriter(folder / name, whole) as writer:
                for layout, unit in shard:
                    for output, tensor in tensors_of(unit):
                        writer.write_tensor(output, [tensor.cpu().contiguous()])
                        bar.update(nbytes(*layout[output]))
            records[name] = writer.record
    if len(shards) > 1:
        with HashedFile(folder / INDEX_FILE) as index:
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            index.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        records[INDEX_FILE] = index.record
    return records
