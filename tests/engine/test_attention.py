"""Tests attention on packed sequences without flash-attn, inside transformers' models."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from qerl_verl.config.rules import PACKED_ATTENTION
from qerl_verl.engine import attention
from qerl_verl.engine.attention import register_attention

SMALL = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
)  # fmt: skip
MODELS = {
    "qwen2": Qwen2Config(**SMALL),
    "qwen2 with a sliding window": Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=None
    ),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "llama": LlamaConfig(**SMALL),
    "mistral with a sliding window": MistralConfig(**SMALL, sliding_window=4, head_dim=16),
}
LENGTHS = (7, 1, 12)


def build(config, implementation, gradient_checkpointing=False):
    register_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_packed_row_is_its_sequences_one_by_one(name, gradient_checkpointing):
    config, ids = MODELS[name], [torch.randint(0, 50, (1, n)) for n in LENGTHS]
    alone = build(config, "eager")
    expected = torch.cat([alone(input_ids=i, use_cache=False).logits[0] for i in ids])
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()

    packed = build(config, PACKED_ATTENTION, gradient_checkpointing)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    found = packed(input_ids=torch.cat(ids, 1), position_ids=positions, attention_mask=None, use_cache=False).logits[0]
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    a, b = gradients(packed), gradients(alone)
    assert (a - b).norm() / b.norm() < 1e-5


def test_rows_with_padding_are_masked_as_by_sdpa():
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    config = MODELS["llama"]
    with torch.no_grad():
        found, expected = (
            build(config, i)(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for i in (PACKED_ATTENTION, "sdpa")
        )
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


def test_all_layers_share_one_packing(monkeypatch):
    counted = []
    real = attention.packing_of
    monkeypatch.setattr(attention, "packing_of", lambda p: counted.append(1) or real(p))
    model, positions = build(MODELS["llama"], PACKED_ATTENTION), torch.arange(5).unsqueeze(0)
    model(input_ids=torch.randint(0, 50, (1, 5)), position_ids=positions, use_cache=False)
    assert counted == [1]


@pytest.mark.parametrize("setting, message", [({"dropout": 0.1}, "no dropout"), ({"softcap": 30.0}, "no softcap")])
def test_what_it_has_not_is_refused(setting, message):
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match=message):
        attention.packed_attention_forward(
            torch.nn.Identity(), q, q, q, None, position_ids=torch.arange(3).unsqueeze(0), **setting
        )


def test_attention_that_is_not_causal_is_sdpas():
    """A vision tower, for example, passes no positions and calls attention once for each image."""
    q = torch.randn(1, 2, 3, 16)
    found, _ = attention.packed_attention_forward(torch.nn.Identity(), q, q, q, None, is_causal=False)
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2))


def test_a_packed_row_without_positions_is_refused():
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="passes no position_ids"):
        attention.packed_attention_forward(torch.nn.Identity(), q, q, q, None)
