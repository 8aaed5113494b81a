"""Describes the places of the tensors in a shared base.

The rows of linears that a rollout engine fuses (q, k and v; gate and up) are adjacent. The fused
weight is then one contiguous matrix, and each projection is a view of its rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE

ALIGNMENT = 512
"""Alignment of every region in bytes, that of CUDA's own allocations."""

FORMAT = 2
"""Version of the text form of a layout. Both processes run the same package unless it differs."""


@dataclass(frozen=True)
class Group:
    """NVFP4 linears with the same input, whose rows are adjacent.

    Attributes:
        parts: full module names in the checkpoint.
        rows: output channels of each part.
        columns: input channels.
        backend: name of the backend in whose layout the bytes are
            (:mod:`qerl_verl.kernels.backends`).
        packed: offset of ``[sum(rows), columns / 2]`` E2M1 codes, two a byte.
        scale: offset of ``[sum(rows), columns / 16]`` block scales.
        global_scales: divisor (``weight_global_scale``) of each part.
        whole: whether the fused weight is in the backend's layout. Otherwise each part is laid out
            by itself, because its rows do not fill the layout's units
            (:attr:`~qerl_verl.kernels.backends.Backend.fused_row_multiple`).
    """

    parts: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    backend: str
    packed: int
    scale: int
    global_scales: tuple[float, ...] = ()
    whole: bool = True

    def views(self, data: torch.Tensor, part: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of packed codes and scales, uint8, of one part or of all parts.

        Args:
            data: the block.
            part: name of the part; None for the fused weight.
        """
        begin, count = 0, sum(self.rows)
        if part is not None:
            index = self.parts.index(part)
            begin, count = sum(self.rows[:index]), self.rows[index]
        return tuple(
            data.narrow(0, offset + begin * width, count * width).view(count, width)
            for offset, width in ((self.packed, self.columns // 2), (self.scale, self.columns // BLOCK_SIZE))
        )


@dataclass(frozen=True)
class Plain:
    """A tensor in 16 or 32 bits.

    Attributes:
        offset: in bytes.
        shape: shape of the tensor.
        dtype: name of the dtype in torch.
        room: number of allocated rows; those beyond ``shape`` are zero.
        shared: whether the second process uses the tensor in place. Other tensors are copied.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str
    room: int
    shared: bool

    def view(self, data: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Returns a view of the tensor in the block ``data``, with ``rows`` rows (up to
        :attr:`room`)."""
        shape = (self.shape[0] if rows is None else rows, *self.shape[1:])
        dtype = getattr(torch, self.dtype)
        size = dtype.itemsize * torch.Size(shape).numel()
        return data.narrow(0, self.offset, size).view(dtype).view(shape)


@dataclass(frozen=True)
class Layout:
    """The places of all tensors of a base.

    Attributes:
        size: bytes of the block.
        groups: the NVFP4 linears.
        tensors: everything else, by its name in the checkpoint.
    """

    size: int
    groups: tuple[Group, ...]
    tensors: dict[str, Plain]

    def shared_bytes(self) -> int:
        """Returns the number of bytes that exist once for two processes."""
        packed = sum(sum(g.rows) * g.columns * 9 // 16 for g in self.groups)
        plain = (p.room * torch.Size(p.shape[1:]).numel() * getattr(torch, p.dtype).itemsize for p in self._in_place())
        return packed + sum(plain)

    def _in_place(self) -> Iterable[Plain]:
        return (plain for plain in self.tensors.values() if plain.shared)

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Reads the result of :meth:`to_json`.

        Raises:
            ValueError: the text is from another version of this package.
        """
        content = json.loads(text)
        if content.get("format") != FORMAT:
            raise ValueError(f"the shared base has format {content.get('format')}, this process reads {FORMAT}")
        groups = tuple(Group(**_with_tuples(group)) for group in content["groups"])
        tensors = {name: Plain(**_with_tuples(plain)) for name, plain in content["tensors"].items()}
        return cls(content["size"], groups, tensors)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Converts the lists of a JSON object to tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


class LayoutBuilder:
    """Assigns places to tensors, in the order of the calls."""

    def __init__(self) -> None:
        self._size = 0
        self._groups: list[Group] = []
        self._tensors: dict[str, Plain] = {}

    def add_group(
        self, parts: Sequence[str], rows: Sequence[int], columns: int, backend: str, whole: bool = True
    ) -> None:
        """Adds NVFP4 linears that are fused; see :class:`Group`."""
        packed = self._take(sum(rows) * columns // 2)
        scale = self._take(sum(rows) * columns // BLOCK_SIZE)
        self._groups.append(Group(tuple(parts), tuple(rows), columns, backend, packed, scale, whole=whole))

    def add_tensor(self, name: str, tensor: torch.Tensor, shared: bool, row_multiple: int = 1) -> None:
        """Adds any other tensor, with its rows padded to a multiple of ``row_multiple``.

        Only the tensor's shape and dtype are read.
        """
        shape = tuple(tensor.shape)
        room = -(-shape[0] // row_multiple) * row_multiple
        offset = self._take(tensor.dtype.itemsize * room * torch.Size(shape[1:]).numel())
        self._tensors[name] = Plain(offset, shape, str(tensor.dtype).removeprefix("torch."), room, shared)

    def build(self) -> Layout:
        return Layout(self._size, tuple(self._groups), dict(self._tensors))

    def _take(self, size: int) -> int:
        offset = self._size
        self._size += -(-size // ALIGNMENT) * ALIGNMENT
        return offset
