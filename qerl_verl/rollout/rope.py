"""Makes rotary embeddings of the rollout equal to those of transformers in the actor."""

from __future__ import annotations

import math
from typing import Any


def rope_overrides(hf_config: Any) -> dict[str, dict[str, Any]]:
    """Returns ``hf_overrides`` with which vLLM's YaRN scales queries and keys as transformers'
    does.

    transformers divides by the factor of ``mscale_all_dim``, or takes ``attention_factor``
    (modeling_rope_utils.py, _compute_yarn_parameters). vLLM only has the factor of ``mscale=1``
    (model_executor/layers/rotary_embedding/yarn_scaling_rope.py). It multiplies that factor by
    ``attn_factor``, or takes ``attn_factor`` itself with ``apply_yarn_scaling=False``. Without
    these settings Ministral 3's log-probabilities differ.

    Args:
        hf_config: transformers' configuration of the model.

    Returns:
        Empty where the two already agree.
    """
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, wanted = ROPE_INIT_FUNCTIONS["yarn"](hf_config, "cpu")
    factor = rope["factor"]
    found = (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0) * rope.get("attn_factor", 1.0)
    if math.isclose(found, wanted, rel_tol=1e-6):
        return {}
    # all settings are given, because vLLM replaces the mapping as a whole
    return {"rope_parameters": {**rope, "apply_yarn_scaling": False, "attn_factor": float(wanted)}}
