"""Writes the weights of a packed checkpoint, one group of linears with a common scale at a time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qerl_verl.kernels.mxfp4_quantize import LARGEST_SPAN, MX_BLOCK_SIZE, NO_EXPONENT, mxfp4_exponents
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.nvfp4.architectures import Architecture
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import WEIGHT_DTYPES, packed_layout
from qerl_verl.nvfp4.layerwise import FinishedLayers
from qerl_verl.nvfp4.quantizers import PackedLinear, SquaredError, round_weight, shared_global_scale, tensors_of
from qerl_verl.nvfp4.safetensors_stream import FileRecord, ShardWriter, TensorInfo, read_pieces, read_tensor
from qerl_verl.nvfp4.shards import divide_into_shards, layout_bytes, whole_layout, write_index
from qerl_verl.nvfp4.tensor_checks import finite_amax
from qerl_verl.nvfp4.unused_tensors import is_unused


@dataclass(frozen=True)
class Unit:
    """One unit of reading: a tensor that is copied, or linears that share a global scale."""

    sources: tuple[str, ...]
    layout: dict[str, tuple[str, tuple[int, ...]]]  # output name -> (dtype, shape)
    quantize: bool

    @property
    def output_bytes(self) -> int:
        return layout_bytes(self.layout)


def plan_units(tensors: dict[str, TensorInfo], architecture: Architecture, hf_config: Any) -> list[Unit]:
    """Returns the units of a 16- or 32-bit checkpoint, in the order of its files.

    Args:
        tensors: full name -> location of every tensor.
        architecture: the row of the model's family.
        hf_config: transformers' configuration of the model.

    Raises:
        CheckpointError: a weight's number of input channels is not a multiple of 16.
    """
    group_of = {linear: group for group in architecture.all_groups(hf_config) for linear in group}
    units, done = [], set()
    for name, info in tensors.items():
        linear = name.removesuffix(".weight")
        if is_unused(name):
            continue
        if linear not in group_of:
            dtype = "BF16" if info.dtype == "F32" and not architecture.keeps_dtype(name) else info.dtype
            units.append(Unit((name,), {name: (dtype, info.shape)}, quantize=False))
        elif linear not in done:
            group = group_of[linear]
            layout = {}
            for member in group:
                n, k = tensors[f"{member}.weight"].shape
                if k % BLOCK_SIZE:
                    raise CheckpointError(
                        f"{tensors[f'{member}.weight'].file}: {member}.weight has {k} input "
                        f"channels. NVFP4 needs a multiple of {BLOCK_SIZE}, so this model cannot "
                        "be quantized."
                    )
                layout |= packed_layout(member, n, k)
            units.append(Unit(tuple(f"{member}.weight" for member in group), layout, quantize=True))
            done.update(group)
    return units


def write_weights(
    dst: Path,
    tensors: dict[str, TensorInfo],
    units: list[Unit],
    max_shard_bytes: int,
    progress: bool,
    packer: Rounder | Finished,
) -> dict[str, FileRecord]:
    """Writes the weights of a packed checkpoint.

    Args:
        dst: an existing folder without weights.
        tensors: full name -> location of every tensor of the source.
        units: what to write, in this order.
        max_shard_bytes: size in bytes above which another file is begun.
        progress: show a progress bar on stderr.
        packer: makes the packed linears.

    Returns:
        File name -> size and SHA-256.

    Raises:
        CheckpointError: a value is NaN or Inf, or does not fit the format.
    """
    shards = divide_into_shards([(unit.layout, unit) for unit in units], max_shard_bytes)
    records = {}
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
        for name, shard in shards.items():
            with ShardWriter(dst / name, whole_layout(shard)) as writer:
                for _, unit in shard:
                    if unit.quantize:
                        packer.begin(tensors, coming[:2])
                        _write_packed(writer, tensors, unit, pool, packer)
                        del coming[0]
                    else:
                        _write_copied(writer, tensors, unit)
                    bar.update(sum(tensors[source].nbytes for source in unit.sources))
            records[name] = writer.record
    return records | write_index(dst, shards)


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
    unit: Unit,
    pool: ThreadPoolExecutor,
    packer: Rounder | Finished,
) -> None:
    for linear, packed in packer.pack(tensors, unit.sources, pool):
        for name, tensor in tensors_of({linear: packed}).items():
            writer.write_tensor(name, [tensor])


def _write_copied(writer: ShardWriter, tensors: dict[str, TensorInfo], unit: Unit) -> None:
    (name,) = unit.sources
    info, (dtype, _) = tensors[name], unit.layout[name]

    def pieces() -> Iterator[torch.Tensor]:
        for piece in read_pieces(info):
            if info.dtype in WEIGHT_DTYPES:
                finite_amax(piece, name, info)
            yield piece if dtype == info.dtype else piece.bfloat16()

    writer.write_tensor(name, pieces())


class Rounder:
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

    def __enter__(self) -> Rounder:
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
        amax = [finite_amax(weight, name, tensors[name]) for name, weight in weights.items()]
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
                f"{tensors[name].file}: {name} has {weight.shape[1]} input channels. MXFP4 needs a "
                f"multiple of {MX_BLOCK_SIZE}: use +qerl=nvfp4 for this model."
            )
        exponents = mxfp4_exponents(weight)
        exponents = exponents[exponents != NO_EXPONENT]
        if exponents.numel():
            lowest[name] = exponents.min().item()
            highest.append(exponents.max().item())
    for name, low in lowest.items():
        if max(highest) - low > LARGEST_SPAN:
            raise CheckpointError(
                f"{tensors[name].file}: tensor {name}: the shared exponents of its blocks of "
                f"{MX_BLOCK_SIZE} go down to {low}, and up to {max(highest)} with the linears that "
                f"it is fused with. That is a span of {max(highest) - low}, and the container of "
                f"NVFP4 holds {LARGEST_SPAN}, the powers of two of E4M3: use +qerl=nvfp4 for this "
                "model."
            )


class Finished:
    """Gives the writer the linears that GPTQ has finished."""

    title = "Writing the checkpoint"

    def __init__(self, finished: FinishedLayers):
        self.errors = finished.errors
        self._finished = finished

    def __enter__(self) -> Finished:
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
