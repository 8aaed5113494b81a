"""Tests names of transformers' model in vLLM's."""

import pytest
from vllm.model_executor.models.utils import WeightsMapper

from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.rollout.names import vllm_name

MAPPER = WeightsMapper(
    orig_to_new_prefix={"model.visual.": "visual.", "model.language_model.": "language_model.model."},
    orig_to_new_substr={},
)
CASES = [
    ("Qwen3VLForConditionalGeneration", MAPPER, "model.language_model.layers.", "language_model.model.layers."),
    ("Qwen3VLForConditionalGeneration", MAPPER, "model.visual.blocks.0", "visual.blocks.0"),
    ("Qwen3VLForConditionalGeneration", None, "model.language_model.", "model.language_model."),
    ("Qwen2ForCausalLM", WeightsMapper(orig_to_new_prefix={"": "model."}), "model.layers.", "model.layers."),
]


@pytest.mark.parametrize(("architecture", "mapper", "name", "expected"), CASES)
def test_the_model_classes_own_mapper_is_asked_where_there_is_a_tower(architecture, mapper, name, expected):
    assert vllm_name(mapper, get_architecture({"architectures": [architecture]}), name) == expected


def test_a_projection_keeps_its_name():
    """vLLM 0.28 maps it to the fused layer that holds it, for weights."""
    if not hasattr(WeightsMapper, "get_unstacked_mapper"):
        pytest.skip("this vLLM fuses elsewhere")
    mapper = MAPPER | WeightsMapper(orig_to_new_stacked={".q_proj": (".qkv_proj", "q")})
    row = get_architecture({"architectures": ["Qwen3VLForConditionalGeneration"]})
    name = "model.language_model.layers.0.self_attn.q_proj"
    assert vllm_name(mapper, row, name) == "language_model.model.layers.0.self_attn.q_proj"
