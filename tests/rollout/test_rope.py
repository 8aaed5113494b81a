"""Tests vLLM's settings of rotary embeddings, and what vLLM computes from them."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from qerl_verl.rollout.rope import rope_overrides
from tests.helpers.tiny_families import FAMILIES, YARN, make_config

MSCALE = YARN | dict(mscale=1.0, mscale_all_dim=1.0)
CASES = [
    ("LlamaForCausalLM", YARN, False),
    ("LlamaForCausalLM", MSCALE, True),
    ("LlamaForCausalLM", YARN | dict(mscale=1.0, mscale_all_dim=0.5), True),
    ("LlamaForCausalLM", YARN | dict(attention_factor=1.5), True),
    # 0.1 ln 4 + 1, as Olmo 3 writes it
    ("LlamaForCausalLM", YARN | dict(attention_factor=1.1386294361119891), False),
    ("Ministral3ForCausalLM", MSCALE | dict(llama_4_scaling_beta=0.1), True),
]


@pytest.mark.parametrize(("name", "rope", "needed"), CASES)
def test_vllms_yarn_is_transformers(name, rope, needed):
    """Compares cos and sin of every position, which transformers multiplies by its factor.

    Where no override is needed, none is given; where one is needed, vLLM without it is another
    model. When that fails, vLLM has learned the settings.
    """
    config = make_config(name, rope_parameters=rope)
    embedding = AutoModelForCausalLM.from_config(config).model.rotary_emb
    positions = torch.arange(128)
    cos, sin = (t[0, :, : t.shape[-1] // 2] for t in embedding(torch.zeros(1, 128, 8), positions[None]))
    size = 2 * cos.shape[-1]

    def vllms(parameters):
        with set_current_vllm_config(VllmConfig()):
            return get_rope(size, 256, rope_parameters=dict(parameters), dtype=torch.float32).cos_sin_cache[:128]

    overrides = rope_overrides(config)
    assert bool(overrides) == needed
    expected = torch.cat([cos, sin], dim=-1)
    torch.testing.assert_close(
        vllms(overrides.get("rope_parameters", config.rope_parameters)), expected, rtol=0, atol=1e-4
    )
    assert torch.allclose(vllms(config.rope_parameters), expected, atol=1e-4) != needed


@pytest.mark.parametrize("name", FAMILIES)
def test_other_rotary_embeddings_are_left_alone(name):
    config = make_config(name)
    assert bool(rope_overrides(config)) == (name == "Ministral3ForCausalLM")
