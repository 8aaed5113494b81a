"""Reads and writes safetensors one tensor at a time, so that memory does not grow with a shard's
size.

The format (https://github.com/huggingface/safetensors) is the header length in 8 little-endian
bytes, a JSON header ``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, and the bytes of
all tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qerl_verl.nvfp4.errors import CheckpointError

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_PIECE_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a finished file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorInfo:
    """Location, dtype and shape of a tensor in a file."""

    file: Path
    offset: int
    dtype: str  # a key of TORCH_DTYPES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * TORCH_DTYPES[dtype].itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Returns name -> location of every tensor in a file, in the order of their bytes.

    Raises:
        CheckpointError: the file is not safetensors, or is shorter or longer than its header says.
    """

    def broken(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: {why}. The file is damaged or its download did not finish: fetch it again.")

    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise broken(f"{size} bytes are too few for a safetensors file")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise broken(f"no safetensors header (it would be {header_bytes} bytes long)")
        raw = file.read(header_bytes)
    if len(raw) < header_bytes:
        raise broken(f"truncated within its header, at {size} bytes")
    tensors, end = {}, 0
    try:
        entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop = entry["data_offsets"]
            info = TensorInfo(path, 8 + header_bytes + begin, entry["dtype"], tuple(entry["shape"]))
            if info.dtype not in TORCH_DTYPES:
                raise CheckpointError(f"{path}: tensor {name} has dtype {info.dtype}, which is not supported.")
            if begin != end or stop != begin + info.nbytes:
                raise broken(f"offsets of tensor {name} do not fit its shape")
            tensors[name], end = info, stop
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise broken("its safetensors header cannot be parsed") from None
    if size != 8 + header_bytes + end:
        raise broken(f"{size} bytes long, but its header says {8 + header_bytes + end}")
    return tensors


def read_pieces(info: TensorInfo, piece_elements: int = _PIECE_ELEMENTS) -> Iterator[torch.Tensor]:
    """Yields the elements of a tensor, flat, in pieces that do not share memory.

    Args:
        info: the tensor's location.
        piece_elements: largest number of elements of a piece.

    Raises:
        CheckpointError: the file ends too early.
    """
    remaining = math.prod(info.shape)
    with info.file.open("rb", buffering=0) as file:
        file.seek(info.offset)
        while remaining:
            piece = torch.empty(min(remaining, piece_elements), dtype=TORCH_DTYPES[info.dtype])
            view = memoryview(piece.view(torch.uint8).numpy())
            while view:
                got = file.readinto(view)
                if not got:
                    raise CheckpointError(f"{info.file}: ended while it was being read. Is something writing to it?")
                view = view[got:]
            remaining -= len(piece)
            yield piece


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Returns the whole tensor, in its own dtype and shape.

    Raises:
        CheckpointError: the file ends too early.
    """
    for tensor in read_pieces(info, piece_elements=max(1, math.prod(info.shape))):
        return tensor.view(info.shape)
    return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits.

    hashlib.file_digest does the same from Python 3.11 on.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


class HashedFile:
    """A new file that hashes what is written to it, synced to disk at the end of ``with``."""

    def __init__(self, path: Path):
        self._path, self._hash, self._size = path, hashlib.sha256(), 0

    def __enter__(self) -> HashedFile:
        self._file = self._path.open("xb")
        self._hasher = ThreadPoolExecutor(1)
        return self

    def write(self, data: bytes | memoryview) -> None:
        hashed = self._hasher.submit(self._hash.update, data)  # while the system copies the data
        self._file.write(data)
        hashed.result()
        self._size += len(data)

    def __exit__(self, exc_type, exc, tb) -> None:
        with self._file, self._hasher:
            if exc_type is None:
                self._file.flush()
                os.fsync(self._file.fileno())  # a full disk may report its error only here

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._size, self._hash.hexdigest())


class ShardWriter(HashedFile):
    """A safetensors file whose tensors arrive one after the other.

    Args:
        path: a file that does not exist.
        layout: name -> (dtype, shape), in the order of the calls of :meth:`write_tensor`.
    """

    def __init__(self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]):
        super().__init__(path)
        self._layout = dict(layout)
        self._pending = iter(self._layout)

    def __enter__(self) -> ShardWriter:
        super().__enter__()
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in self._layout.items():
            begin, end = end, end + nbytes(dtype, shape)
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self.write(len(raw).to_bytes(8, "little") + raw)
        return self

    def write_tensor(self, name: str, pieces: Iterable[torch.Tensor]) -> None:
        """Writes the elements of the layout's next tensor, in one or more contiguous pieces.

        Raises:
            ValueError: name, dtype or size differs from the layout.
        """
        dtype, shape = self._layout[name]
        if name != next(self._pending, None):
            raise ValueError(f"{name} is not the next tensor of the layout")
        before = self._size
        for piece in pieces:
            if piece.dtype != TORCH_DTYPES[dtype]:
                raise ValueError(f"{name}: {piece.dtype} where the layout says {dtype}")
            self.write(memoryview(piece.reshape(-1).view(torch.uint8).numpy()))
        if self._size - before != nbytes(dtype, shape):
            raise ValueError(f"{name}: {self._size - before} bytes where the layout says {nbytes(dtype, shape)}")
