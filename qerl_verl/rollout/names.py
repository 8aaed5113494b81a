"""Translates names to vLLM's in a model with a vision tower.

vLLM puts the decoder of such a model into a module of its own (``language_model.model.layers.``
where transformers has ``model.language_model.layers.``), and maps the names of weights, adapters
and ignored layers with ``hf_to_vllm_mapper`` of the model class. This module uses the same mapper.
"""

from __future__ import annotations

from typing import Any

from qerl_verl.nvfp4.architectures import Architecture


def vllm_name(mapper: Any, architecture: Architecture, name: str) -> str:
    """Returns the name of a module, or a prefix of names, in vLLM's model.

    Args:
        mapper: ``hf_to_vllm_mapper`` of vLLM's model class, or None.
        architecture: the model's row of the table of architectures.
        name: the name in transformers' model.
    """
    if mapper is None or not architecture.vision:
        return name
    # vLLM 0.28 also maps projections to the fused layers that hold them
    mapper = mapper.get_unstacked_mapper() if hasattr(mapper, "get_unstacked_mapper") else mapper
    (mapped,) = mapper.apply_list([name])
    return mapped
