"""Computes causal attention over sequences that are packed one behind the other, without a mask.

* :func:`packed_attention_reference` computes one sequence after the other with PyTorch's scaled dot
  product attention;
* :func:`packed_attention` runs PyTorch's variable-length FlashAttention
  (``torch.nn.attention.varlen``) where it can.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

MAX_HEAD_DIM = 256
"""The limit of FlashAttention 2 (aten/src/ATen/native/transformers/cuda/flash_attn)."""


class Packing(NamedTuple):
    """Where the sequences of a packed row begin."""

    offsets: torch.Tensor
    """``[sequences + 1]`` int32, on the device of the tokens: the first token of each sequence,
    and the number of tokens."""
    longest: int
    """The number of tokens of the longest sequence."""
    host_offsets: tuple[int, ...]
    """``offsets`` on the host."""


def packing_of(position_ids: torch.Tensor) -> Packing:
    """Returns the sequences of a packed row, each of which begins at position 0. Waits for the
    device.

    Args:
        position_ids: ``[1, tokens]`` integers.

    Raises:
        ValueError: the shape differs, or the first token is not at position 0.
    """
    if position_ids.ndim != 2 or position_ids.shape[0] != 1 or position_ids.shape[1] == 0:
        raise ValueError(f"position_ids of packed sequences have to be [1, tokens], got {list(position_ids.shape)}")
    starts = (position_ids[0] == 0).nonzero().flatten()
    host = (*starts.tolist(), position_ids.shape[1])
    if host[0] != 0:
        raise ValueError("position_ids of packed sequences have to begin with 0")
    longest = max(end - begin for begin, end in zip(host, host[1:]))
    offsets = torch.tensor(host, dtype=torch.int32, device=position_ids.device)
    return Packing(offsets, longest, host)


def packed_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Computes :func:`packed_attention` in plain PyTorch, on any device and in any dtype."""
    outputs = []
    for begin, end in zip(packing.host_offsets, packing.host_offsets[1:]):
        q, k, v = (t[begin:end].transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        mask = None
        if window is not None and end - begin > window:
            position = torch.arange(end - begin, device=query.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < window)
        y = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        outputs.append(y[0].transpose(0, 1))
    return torch.cat(outputs)


def unsupported(query: torch.Tensor) -> str | None:
    """Returns why FlashAttention does not support tensors like ``query`` ``[tokens, heads,
    head_dim]``, or None if it does.
    """
    if query.device.type != "cuda":
        return f"it runs on CUDA, not on {query.device.type}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM or query.shape[-1] % 8:
        return f"its head_dim is a multiple of 8 up to {MAX_HEAD_DIM}, not {query.shape[-1]}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs compute capability 8.0"
    return None


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Computes causal attention within each sequence of a packed row; differentiable.

    Args:
        query: ``[tokens, heads, head_dim]``.
        key, value: ``[tokens, key_value_heads, head_dim]``; ``heads`` is a multiple of
            ``key_value_heads``.
        packing: from :func:`packing_of`.
        scale: scale of the scores; None is ``head_dim ** -0.5``.
        window: each token attends to itself and the ``window - 1`` tokens before it; None to all
            before it.

    Returns:
        ``[tokens, heads, head_dim]`` in ``query.dtype``.
    """
    if unsupported(query) is not None:
        return packed_attention_reference(query, key, value, packing, scale, window)
    from torch.nn.attention.varlen import varlen_attn

    options = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    # PyTorch 2.12 and later require it.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    offsets, longest = packing.offsets, packing.longest
    return varlen_attn(query, key, value, offsets, offsets, longest, longest, **options)
