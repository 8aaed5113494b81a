"""Computes attention of packed sequences for transformers' models, registered under
:data:`PACKED_ATTENTION`.

verl packs a micro-batch into one row (``use_remove_padding``). transformers' SDPA then gets a dense
mask of all tokens against all tokens; this function passes the borders of the sequences to
FlashAttention of PyTorch instead, which needs no flash-attn. Under Ulysses sequence parallelism it
exchanges heads as verl does in front of flash-attn (verl/models/transformers/monkey_patch.py,
_ulysses_flash_attention_forward).
"""

from __future__ import annotations

import inspect

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from verl.utils.ulysses import (
    gather_heads_scatter_seq,
    gather_seq_scatter_heads,
    get_ulysses_sequence_parallel_group,
    get_ulysses_sequence_parallel_world_size,
)

from qerl_verl.config.rules import PACKED_ATTENTION
from qerl_verl.kernels.packed_attention import Packing, packed_attention, packing_of

_packings: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Packing of each ``position_ids`` that is alive: all layers of a forward pass, and its second
run, share one."""


def register_attention() -> None:
    """Registers ``attn_implementation=qerl_packed`` with transformers in this process.
    A second call changes nothing."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, packed_attention_mask)


def hand_on_positions(model: torch.nn.Module) -> None:
    """Lets :func:`packed_attention_forward` know the positions of layers that do not hand them on.

    transformers' attention layers pass what they do not use to the attention function, and with it
    ``position_ids``. Ministral 3's uses them and passes none
    (models/ministral3/modeling_ministral3.py, Ministral3Attention.forward), so its sequences in one
    row would not be told apart.

    Args:
        model: each of its attention layers whose ``forward`` takes ``position_ids`` gets a hook
            that notes them.
    """
    for layer in model.modules():
        takes = "position_ids" in inspect.signature(type(layer).forward).parameters
        if takes and type(layer).__name__.endswith("Attention"):
            layer.register_forward_pre_hook(_note_positions, with_kwargs=True)


def _note_positions(layer: torch.nn.Module, args: tuple, kwargs: dict) -> None:
    layer.qerl_position_ids = kwargs.get("position_ids")


def packed_attention_mask(batch_size: int, *args, attention_mask: torch.Tensor | None = None, **kwargs):
    """Returns None for one row without padding, and transformers' SDPA mask for every other
    input."""
    if batch_size == 1 and attention_mask is None:
        return None
    return sdpa_mask(batch_size, *args, attention_mask=attention_mask, **kwargs)


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Computes the attention of one layer, with the signature of transformers' attention interface.

    Args:
        query: ``[batch, heads, tokens, head_dim]``; under Ulysses, this rank's slice of the tokens.
        key, value: ``[batch, key_value_heads, tokens, head_dim]``.
        attention_mask: from :func:`packed_attention_mask`; None means one packed row.
        position_ids: ``[1, tokens]``; each sequence begins at 0. Defaults to the positions that
            :func:`hand_on_positions` has noted.
        kwargs: with ``is_causal=False``, SDPA computes the attention. A vision tower passes it and
            calls once for each image.

    Returns:
        ``[batch, tokens, heads, head_dim]``, and None for the attention weights.

    Raises:
        ValueError: a packed row without position_ids, or with dropout or a softcap, which
            FlashAttention's variable-length form does not support.
    """
    if attention_mask is not None or query.shape[0] != 1 or kwargs.get("is_causal") is False:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if position_ids is None:
        position_ids = getattr(module, "qerl_position_ids", None)
    if position_ids is None:
        raise ValueError(f"{PACKED_ATTENTION}: {type(module).__name__} passes no position_ids to its attention")
    for name, setting in (("dropout", dropout), ("softcap", kwargs.get("softcap"))):
        if setting:
            raise ValueError(f"{PACKED_ATTENTION} has no {name}; set override_config.attn_implementation=sdpa")
    if query.dtype == torch.float32 and torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    ranks = get_ulysses_sequence_parallel_world_size()
    # [1, tokens, heads, head_dim]
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    if ranks > 1:
        repeats = max(ranks // key.shape[2], 1)
        key, value = (t.repeat_interleave(repeats, dim=2) for t in (key, value))
        query, key, value = (gather_seq_scatter_heads(t, seq_dim=1, head_dim=2) for t in (query, key, value))
    output = packed_attention(query[0], key[0], value[0], _packing(position_ids, ranks), scaling, sliding_window)
    output = output.unsqueeze(0)
    if ranks > 1:
        output = gather_heads_scatter_seq(output, seq_dim=1, head_dim=2)
    return output, None


def _packing(position_ids: torch.Tensor, ranks: int) -> Packing:
    """Returns the sequence borders of the whole row, including the tokens of other Ulysses
    ranks."""
    packing = _packings.get(position_ids)
    if packing is None:
        whole = position_ids
        if ranks > 1:
            parts = [torch.empty_like(position_ids) for _ in range(ranks)]
            dist.all_gather(parts, position_ids.contiguous(), group=get_ulysses_sequence_parallel_group())
            whole = torch.cat(parts, dim=-1)
        packing = _packings[position_ids] = packing_of(whole)
    return packing
