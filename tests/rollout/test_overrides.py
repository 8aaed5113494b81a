"""Tests what a rollout engine is told about a model beside its config.json."""

import pytest

from qerl_verl.rollout.overrides import decoder_overrides, hf_overrides
from qerl_verl.rollout.rope import rope_overrides
from tests.helpers.tiny_families import FAMILIES, make_config

QWEN3_VL = "Qwen3VLForConditionalGeneration"


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_decoders_class_is_named_where_vllms_cpu_engine_asks_for_it(name, on_cpu):
    config = make_config(name)
    expected = {"text_config": {"architectures": ["Qwen3ForCausalLM"]}} if on_cpu and name == QWEN3_VL else {}
    assert hf_overrides(config, on_cpu) == rope_overrides(config) | expected


def test_of_several_architectures_the_known_one_counts():
    assert decoder_overrides(["Other", QWEN3_VL]) == decoder_overrides([QWEN3_VL]) != {}
    assert decoder_overrides([]) == {}
