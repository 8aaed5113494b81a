"""The experts of a mixture against the same mathematics in float64, and the routing."""

import pytest
import torch

from qerl_verl.kernels.nvfp4_experts import nvfp4_experts_reference, route_softmax
from tests.helpers.tiny_experts import TinyExperts, make_tokens

EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 6, 64, 48, 2, 11
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 2e-6, torch.float64: 1e-12}
"""Error relative to the largest output: some roundings to the dtype, one after the other."""


def problem(dtype, shared_scale=True):
    x, logits = make_tokens(dtype, TOKENS, HIDDEN, EXPERTS)
    return TinyExperts(EXPERTS, HIDDEN, INNER, shared_scale), x, *route_softmax(logits, TOP_K, True)


@pytest.mark.parametrize("shared_scale", [True, False])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_the_experts_of_each_token(dtype, shared_scale):
    experts, x, weights, chosen = problem(dtype, shared_scale)
    want = experts.compute(x, weights, chosen)
    got = nvfp4_experts_reference(x, weights, chosen, *experts.weights())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * want.abs().max().item())


def test_an_expert_of_another_rank_adds_nothing():
    experts, x, weights, chosen = problem(torch.float64)
    chosen[:, 1] = -1
    want = experts.compute(x, weights, chosen)
    torch.testing.assert_close(nvfp4_experts_reference(x, weights, chosen, *experts.weights()), want)
    none = torch.full_like(chosen, -1)
    assert not nvfp4_experts_reference(x, weights, none, *experts.weights()).any()
    assert nvfp4_experts_reference(x[:0], weights[:0], chosen[:0], *experts.weights()).shape == (0, HIDDEN)


@pytest.mark.parametrize("renormalize", [True, False])
def test_routing_is_transformers(renormalize):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    sizes = dict(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K)
    router = Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes, norm_topk_prob=renormalize))
    torch.nn.init.normal_(router.weight)
    logits, want_weights, want_chosen = router(torch.randn(TOKENS, HIDDEN))
    weights, chosen = route_softmax(logits, TOP_K, renormalize)
    assert torch.equal(chosen, want_chosen) and torch.equal(weights, want_weights)
    assert weights.dtype == torch.float32
    assert torch.allclose(weights.sum(-1), torch.ones(TOKENS)) == renormalize
