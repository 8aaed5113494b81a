"""Names tensors of checkpoints that take part in no computation here."""

from __future__ import annotations

import re

KV_CACHE_SCALE = re.compile(
    r"\.self_attn\.(?:[qkv]_(?:scale|zero_point)|[qkv]_proj\.(?:output_scale|output_zero_point|[kv]_scale))$"
)
"""Scales of a quantized KV cache, as llm-compressor and vLLM name them."""

_OTHERS = re.compile(
    # A buffer that models compute from config.json; transformers saved it up to 4.31.
    r"\.rotary_emb\.inv_freq$"
    # Qwen3.5's head that predicts further tokens, for speculative decoding.
    r"|^mtp\."
    # llm-compressor's: one for 4-bit activations, one for unpacking.
    r"|\.(?:input_global_scale|weight_shape)$"
)


def is_unused(name: str) -> bool:
    """Returns whether quantization, actor, critic and rollout skip a tensor."""
    return bool(KV_CACHE_SCALE.search(name) or _OTHERS.search(name))
