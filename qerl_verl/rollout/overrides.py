"""Computes vLLM's ``hf_overrides``, with which an engine builds the same model as the actor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qerl_verl.rollout.rope import rope_overrides

_DECODERS = {"Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM"}
"""Architecture -> vLLM's class of its decoder."""


def hf_overrides(hf_config: Any, on_cpu: bool) -> dict[str, dict[str, Any]]:
    """Returns the overrides for an engine of a model.

    Args:
        hf_config: transformers' configuration of the model.
        on_cpu: whether the engine is vLLM's CPU engine.
    """
    decoders = decoder_overrides(getattr(hf_config, "architectures", None) or ()) if on_cpu else {}
    return rope_overrides(hf_config) | decoders


def decoder_overrides(architectures: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns the names the class of Qwen3-VL's decoder.

    vLLM builds that decoder from ``text_config`` alone (model_executor/models/qwen3_vl.py,
    Qwen3VLForConditionalGeneration), and its CPU platform then reads the class from it
    (platforms/cpu.py, check_and_update_config). Without it, stock vLLM 0.28 stops on a CPU with
    "IndexError: list index out of range".

    Args:
        architectures: ``architectures`` of the model's configuration.
    """
    found = next((_DECODERS[name] for name in architectures if name in _DECODERS), None)
    return {"text_config": {"architectures": [found]}} if found else {}
