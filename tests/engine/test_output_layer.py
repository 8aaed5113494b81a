"""Tests log-probabilities from the output layer, as verl's ``use_fused_kernels`` path calls it."""

import inspect

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers import dense_common
from verl.utils import fsdp_utils
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from qerl_verl.engine.output_layer import LogprobLinear, use_logprob_layer


def tiny(tied):
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=50, tie_word_embeddings=tied,
        )
    ).requires_grad_(False)  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_log_probabilities_are_those_of_the_logits(tied, shift):
    model, ids = tiny(tied), torch.randint(0, 50, (1, 9))
    labels = torch.roll(ids, -1, -1)
    expected = (model(input_ids=ids).logits / 0.7).log_softmax(-1)
    use_logprob_layer(model)
    given = {"shift_labels": labels} if shift else {}
    output = model(input_ids=ids, temperature=0.7, return_dict=True, use_cache=False, **given)
    torch.testing.assert_close(output.log_probs, expected.gather(-1, labels.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(output.entropy, -(expected.exp() * expected).sum(-1))


def test_without_a_temperature_the_model_is_as_it_was():
    model, ids = tiny(True), torch.randint(0, 50, (2, 5))
    before = model(input_ids=ids).logits
    use_logprob_layer(model)
    assert torch.equal(model(input_ids=ids).logits, before) and type(model.lm_head) is LogprobLinear


def test_another_output_layer_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=20))
    model.lm_head = torch.nn.Linear(16, 20, bias=True)
    with pytest.raises(ValueError, match="use_fused_kernels=True: GPT2LMHeadModel"):
        use_logprob_layer(model)


def test_a_model_that_caps_its_logits_is_refused():
    model = tiny(True)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="use_fused_kernels=True: Qwen2ForCausalLM caps its logits"):
        use_logprob_layer(model)


def test_verl_shards_an_untied_output_layer_by_itself_and_reads_its_weight():
    """verl's own fused kernels are therefore not used. When this fails, they may be."""
    model = tiny(False)
    assert any(part is model.lm_head for part in fsdp_utils._select_fsdp2_wrap_targets(model, []))
    assert not fsdp_utils._select_fsdp2_wrap_targets(tiny(True), [])
    assert "vocab_weights=self.lm_head.weight" in inspect.getsource(dense_common.forward_with_torch_backend)


def test_verl_calls_the_model_with_temperature_and_labels():
    source = inspect.getsource(FSDPEngineWithLMHead.prepare_model_inputs)
    assert 'extra_args["temperature"]' in source and 'extra_args["shift_labels"]' in source
