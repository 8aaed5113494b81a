"""Writes the tensors of a checkpoint into safetensors files of bounded size, unit by unit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from tqdm import tqdm

from qerl_verl.nvfp4.checkpoint_files import INDEX_FILE, SINGLE_FILE, write_json
from qerl_verl.nvfp4.safetensors_stream import FileRecord, ShardWriter, nbytes

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
    shards = divide_into_shards(units, max_shard_bytes)
    records = {}
    bar = tqdm(
        total=sum(layout_bytes(layout) for shard in shards.values() for layout, _ in shard),
        desc=title,
        unit="B",
        unit_scale=True,
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 30,
    )
    with bar:
        for name, shard in shards.items():
            with ShardWriter(folder / name, whole_layout(shard)) as writer:
                for layout, unit in shard:
                    for output, tensor in tensors_of(unit):
                        writer.write_tensor(output, [tensor.cpu().contiguous()])
                        bar.update(nbytes(*layout[output]))
            records[name] = writer.record
    return records | write_index(folder, shards)


def layout_bytes(layout: Layout) -> int:
    """Returns the size in bytes of the tensors of a layout."""
    return sum(nbytes(*entry) for entry in layout.values())


def divide_into_shards(
    units: Iterable[tuple[Layout, Unit]], max_shard_bytes: int
) -> dict[str, list[tuple[Layout, Unit]]]:
    """Returns file name -> the units of this file, in the order in which they are given."""
    shards: list[list[tuple[Layout, Unit]]] = [[]]
    size = 0
    for layout, unit in units:
        length = layout_bytes(layout)
        if shards[-1] and size + length > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((layout, unit))
        size += length
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def whole_layout(shard: Iterable[tuple[Layout, Unit]]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns the layout of a file."""
    return {output: entry for layout, _ in shard for output, entry in layout.items()}


def write_index(folder: Path, shards: Mapping[str, list[tuple[Layout, Unit]]]) -> dict[str, FileRecord]:
    """Writes the index of several files, as transformers does.

    Returns:
        File name -> size and SHA-256; empty for a single file, which has no index.
    """
    if len(shards) == 1:
        return {}
    weight_map = {output: name for name, shard in shards.items() for output in whole_layout(shard)}
    total = sum(layout_bytes(layout) for shard in shards.values() for layout, _ in shard)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {INDEX_FILE: write_json(folder / INDEX_FILE, content)}
