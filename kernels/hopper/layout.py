"""Defines the prepacked weight layout of the Hopper kernels in PyTorch, as ``nvfp4_format.cuh``
does in CUDA.

The layout is a permutation of the checkpoint's bits and has the same size. Its units are 64 x 64
weights. In a unit each lane of a warpgroup finds the 32 codes that it holds as tensor core
fragments in 16 consecutive bytes. The four pairs of codes in a 32-bit word lie such that a rotation
and a mask turn a pair into two bfloat16. An E4M3 scale byte becomes the same number with five
exponent bits and no sign, so that its bits fit into bfloat16 without a case distinction:

* a negative scale gives its sign to its 16 codes, and a scale of zero makes its 16 codes zero (the
  values stay the same);
* any other byte can be turned back, and ``unpack`` does so.
"""

from __future__ import annotations

import functools

import torch

UNIT = 64
"""Rows and columns of a unit. N and K have to be multiples of it, and K of 128 for every kernel
configuration to fit."""

_PAIR_BITS = ("m", "e0", "e1", "s")
_BF16_PLACE = {"m": 6, "e0": 7, "e1": 8, "s": 15}
_CODE_PLACE = {"m": 0, "e0": 1, "e1": 2, "s": 3}
_ROTATION = (  # right rotation that brings a bit of pair p to its place in bfloat16
    {"m": 26, "e0": 26, "e1": 26, "s": 26},
    {"m": 4, "e0": 4, "e1": 4, "s": 4},
    {"m": 30, "e0": 6, "e1": 6, "s": 6},
    {"m": 0, "e0": 0, "e1": 0, "s": 0},
)


GROUP = 4
"""Units that lie together: a group is 4 units in N (the last group may have fewer), by K first."""


def _group(units: torch.Tensor) -> torch.Tensor:
    """Reorders ``[N / 64, K / 64, bytes]`` from row-major order of units to the order of groups;
    flat.
    """
    full = units.shape[0] // GROUP * GROUP
    parts = [
        units[:full].unflatten(0, (-1, GROUP)).transpose(1, 2).reshape(-1),
        units[full:].transpose(0, 1).reshape(-1),
    ]
    return torch.cat(parts)


def _ungroup(flat: torch.Tensor, n: int, k: int, unit_bytes: int) -> torch.Tensor:
    rows, full = n // UNIT, n // UNIT // GROUP * GROUP
    split = full * (k // UNIT) * unit_bytes
    head = flat[:split].view(-1, k // UNIT, GROUP, unit_bytes).transpose(1, 2).reshape(full, k // UNIT, unit_bytes)
    tail = flat[split:].view(k // UNIT, rows - full, unit_bytes).transpose(0, 1)
    return torch.cat((head, tail))


@functools.cache
def word_bits() -> tuple[tuple[int, int, int], ...]:
    """Returns, for each bit of a word that holds code ``i = 2 * pair + half``, ``(i, bit of the
    code, bit of the word)``.
    """
    bits = []
    for pair in range(4):
        for half in range(2):
            for name in _PAIR_BITS:
                place = _BF16_PLACE[name] + 16 * half
                bits.append((2 * pair + half, _CODE_PLACE[name], (place + _ROTATION[pair][name]) % 32))
    assert sorted(b for _, _, b in bits) == list(range(32))
    return tuple(bits)


@functools.cache
def _scale_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tables from an E4M3 byte (sign ignored) to the five-exponent-bit byte and back,
    on the host.

    The tables are never cached on a device, because an inference engine that sleeps frees its
    device memory, cached tensors included.
    """
    value = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    mantissa, exponent = torch.frexp(value)  # value = mantissa * 2**exponent, mantissa in [0.5, 1)
    code = (exponent.long() - 1 + 23) * 8 + (mantissa * 16).nan_to_num().long() - 8
    code[value == 0] = 0
    code[127] = 0  # NaN, refused by prepack
    to_code = torch.cat((code, code)).to(torch.uint8)
    back = torch.zeros(256, dtype=torch.uint8)
    back[code[:127]] = torch.arange(127, dtype=torch.uint8)
    return to_code, back


def unsupported_shape(n: int, k: int) -> str | None:
    """Returns why an ``[n, k]`` weight cannot be prepacked, or None."""
    if n % UNIT or k % UNIT:
        return f"N and K have to be multiples of {UNIT}, got {n} x {k}"
    return None


def prepack(packed: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Permutes a weight from the checkpoint's layout to that of the kernels.

    Args:
        packed: ``[N, K / 2]`` uint8, two E2M1 codes a byte, low nibble first.
        scale: ``[N, K / 16]`` float8_e4m3fn, or the same bytes as uint8.

    Returns:
        Two new uint8 tensors of the same shapes. The shapes give only their sizes: a row holds no
        row of the weight.

    Raises:
        ValueError: a shape that the layout does not cover, or a scale that is NaN.
    """
    n, k = packed.shape[0], packed.shape[1] * 2
    if reason := unsupported_shape(n, k):
        raise ValueError(reason)
    if tuple(scale.shape) != (n, k // 16):
        raise ValueError(
            f"scales of shape ({n}, {k // 16}) belong to packed {tuple(packed.shape)}; got {tuple(scale.shape)}"
        )
    scale = scale.view(torch.uint8)
    if ((scale & 0x7F) == 0x7F).any():
        raise ValueError("a block scale is NaN")
    packed_out, scale_out = (
        torch.empty_like(packed, memory_format=torch.contiguous_format),
        torch.empty_like(scale, memory_format=torch.contiguous_format),
    )
    to_code = _scale_tables()[0].to(packed.device)
    rows = max(1, (1 << 24) // (UNIT * GROUP * k)) * UNIT * GROUP  # bounds the temporary memory
    for begin in range(0, n, rows):
        end = min(n, begin + rows)
        b = packed[begin:end]
        codes = torch.stack((b & 0xF, b >> 4), dim=-1).view(end - begin, k // 16, 16)
        s = scale[begin:end].unsqueeze(-1)
        codes = codes ^ ((s >> 7) << 3)
        codes = codes * ((s & 0x7F) != 0)
        # row = (row unit, warp, g // 2, h, g % 2), k = (k unit, step j, half hk, t, e)
        codes = codes.view(-1, 4, 4, 2, 2, k // UNIT, 4, 2, 4, 2)
        # words of (hk, h, e)
        codes = codes.permute(0, 5, 1, 2, 4, 8, 6, 7, 3, 9).reshape(-1, 8).int()
        words = torch.zeros_like(codes[:, 0])
        for i, code_bit, word_bit in word_bits():
            words |= ((codes[:, i] >> code_bit) & 1) << word_bit
        packed_out[begin:end] = _group(words.view(torch.uint8).view(-1, k // UNIT, 2048)).view(end - begin, k // 2)
        s = to_code[scale[begin:end].int()].view(-1, 4, 4, 2, 2, k // UNIT, 4)
        scale_out[begin:end] = _group(s.permute(0, 5, 1, 2, 4, 6, 3).reshape(-1, k // UNIT, 256)).view(
            end - begin, k // 16
        )
    return packed_out, scale_out


def unpack(packed_p: torch.Tensor, scale_p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the inverse of :func:`prepack`: ``(packed, scale)`` as uint8 in the checkpoint's
    layout."""
    n, k = packed_p.shape[0], packed_p.shape[1] * 2
    words = _ungroup(packed_p.reshape(-1), n, k, 2048).reshape(-1).view(torch.int32)
    codes = torch.zeros((words.numel(), 8), dtype=torch.uint8, device=words.device)
    for i, code_bit, word_bit in word_bits():
        codes[:, i] |= (((words >> word_bit) & 1) << code_bit).to(torch.uint8)
    codes = codes.view(
        n // UNIT, k // UNIT, 4, 4, 2, 4, 4, 2, 2, 2
    )  # unit, k unit, warp, g // 2, g % 2, t, j, hk, h, e
    codes = codes.permute(0, 2, 3, 8, 4, 1, 6, 7, 5, 9).reshape(n, k)
    back = _scale_tables()[1].to(packed_p.device)
    s = (
        back[_ungroup(scale_p.reshape(-1), n, k, 256).int()]
        .view(n // UNIT, k // UNIT, 4, 4, 2, 4, 2)
        .permute(0, 2, 3, 6, 4, 1, 5)
        .reshape(n, k // 16)
    )
    return codes[:, ::2] | (codes[:, 1::2] << 4), s.contiguous()


LORA_UNIT = 16
"""Columns of a LoRA B in one tensor core step. A rank has to be a multiple of it."""


def prepack_lora_b(b: torch.Tensor) -> torch.Tensor:
    """Returns a LoRA B ``[N, rank]`` in the order in which the kernel reads it: fragments of 64 x
    16, in groups like the weight's units.

    Returns:
        A new tensor of the same shape and dtype; only its size means what the shape says.

    Raises:
        ValueError: N is not a multiple of 64, or the rank not one of 16.
    """
    n, rank = b.shape
    if n % UNIT or rank % LORA_UNIT:
        raise ValueError(f"B has to be [multiple of {UNIT}, multiple of {LORA_UNIT}], got {tuple(b.shape)}")
    # row = (row unit, warp, g // 2, h, g % 2), column = (step j, half hk, t, e)
    units = b.reshape(-1, 4, 4, 2, 2, rank // LORA_UNIT, 2, 4, 2).permute(0, 5, 1, 2, 4, 7, 6, 3, 8)
    return _group(units.reshape(n // UNIT, rank // LORA_UNIT, UNIT * LORA_UNIT)).view(n, rank)


def unpack_lora_b(b_p: torch.Tensor) -> torch.Tensor:
    """Returns the inverse of :func:`prepack_lora_b`."""
    n, rank = b_p.shape
    units = _ungroup(b_p.reshape(-1), n, rank // LORA_UNIT * UNIT, UNIT * LORA_UNIT)
    # unit, j, warp, g // 2, g % 2, t, hk, h, e
    units = units.view(-1, rank // LORA_UNIT, 4, 4, 2, 4, 2, 2, 2)
    return units.permute(0, 2, 3, 7, 4, 1, 6, 5, 8).reshape(n, rank)
