"""Tensors that checkpoints hold and that nothing here computes with."""

from __future__ import annotations

import re

KV_CACHE_SCALE = re.compile(
    r"\.self_attn\.(?:[qkv]_(?:scale|zero_point)|[qkv]_proj\.(?:output_scale|output_zero_point|[kv]_scale))$"
)
"""Scales of a quantized KV cache, as llm-compressor and vLLM name them."""

_OTHERS = re.compile(
    r"\.rotary_emb\.inv_freq$"  # a buffer that models compute from config.json; transformers saved it up to 4.31
    r"|\.(?:input_global_scale|weight_shape)$"  # llm-compressor's, for 4-bit activations and for unpacking
)


def is_unused(name: str) -> bool:
    """Returns whether a tensor is left out: when quantizing, and when actor, critic or rollout load
    it."""
    return bool(KV_CACHE_SCALE.search(name) or _OTHERS.search(name))
