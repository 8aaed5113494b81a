"""vLLM's names of what a model with a vision tower holds.

vLLM puts the decoder of such a model into a module of its own (``language_model.model.layers.``
where transformers has ``model.language_model.layers.``) and maps the names of weights, adapters and
ignored layers with the model class's ``hf_to_vllm_mapper``. The same mapper serves here.
"""

from __future__ import annotations

from typing import Any

from qerl_verl.nvfp4.architectures import Architecture


def vllm_name(mapper: Any, architecture: Architecture, name: str) -> str:
    """Returns a module's name, or the beginning of names, in vLLM's model.

    Args:
        mapper: ``hf_to_vllm_mapper`` of vLLM's model class, None where it has none.
        architecture: of the model.
        name: in transformers' model.
    """
    if mapper is None or not architecture.vision:
        return name
    # vLLM 0.28 also maps projections to the fused layers that hold them
    mapper = mapper.get_unstacked_mapper() if hasattr(mapper, "get_unstacked_mapper") else mapper
    (mapped,) = mapper.apply_list([name])
    return mapped
