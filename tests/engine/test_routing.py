"""The rollout's routing in the actor's routers, and through verl's FSDP2 engine."""

import pytest
import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from qerl_verl.engine.routing import RoutingReplay, flatten
from tests.helpers.tiny_families import make_model

TOKENS, EXPERTS, TOP_K, HIDDEN = 7, 6, 2, 16
NAME = "layers.1.mlp.gate"


def router_of(**settings):
    """Returns one router as the layer 1 of a model, in float64, and its replay."""
    sizes = dict(hidden_size=HIDDEN, num_experts=EXPERTS, num_experts_per_tok=TOP_K) | settings
    router = Qwen3MoeTopKRouter(Qwen3MoeConfig(**sizes)).double()
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    model, parent = torch.nn.Module(), torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module(), parent])
    parent.mlp = torch.nn.Module()
    parent.mlp.gate = router
    return router, RoutingReplay(model, (NAME,))


def recorded_choices(*rows):
    """Returns the choices of two layers, the first of which has no experts."""
    return torch.stack([torch.zeros(len(rows), TOP_K, dtype=torch.int16), torch.tensor(rows, dtype=torch.int16)], 1)


@pytest.mark.parametrize("renormalize", [True, False])
def test_tokens_go_where_the_rollout_sent_them(renormalize):
    """With the actor's own probabilities of these experts, differentiable in the token."""
    router, replay = router_of(norm_topk_prob=renormalize)
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([[5, 0], [1, 2], [3, 4]])
    replay.begin(recorded_choices(*wanted.tolist()), 3)
    logits, weights, chosen = router(x)
    assert torch.equal(chosen, wanted) and weights.dtype == torch.float64
    expected = (x @ router.weight.t()).softmax(-1).gather(-1, wanted)
    expected = expected / expected.sum(-1, keepdim=True) if renormalize else expected
    # the router's softmax is in float32
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)
    upstream = torch.randn_like(weights)
    found, right = (torch.autograd.grad((w * upstream).sum(), x, retain_graph=True)[0] for w in (weights, expected))
    assert (found - right).norm() < 1e-5 * right.norm()


def test_its_own_choices_change_nothing():
    """Nor do rows without a recorded choice, the last token of a sequence and padding."""
    router, replay = router_of()
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    clean = router(x)
    for rows in (clean[2].tolist(), [[0, 0]] * TOKENS):
        replay.begin(recorded_choices(*rows), TOKENS)
        assert all(torch.equal(found, own) for found, own in zip(router(x), clean, strict=True))
    wanted = [[5, 0]] * (TOKENS - 1) + [[0, 0]]
    replay.begin(recorded_choices(*wanted), TOKENS)
    mixed = router(x)[2]
    assert mixed[:-1].tolist() == wanted[:-1] and torch.equal(mixed[-1], clean[2][-1])
    with replay.paused():
        assert torch.equal(router(x)[2], clean[2])
    assert torch.equal(router(x)[2], mixed)
    with replay.replaying(recorded_choices(*wanted)):
        assert torch.equal(router(x)[2], mixed)
    assert torch.equal(router(x)[2], clean[2])


def test_the_order_of_the_models_input():
    rows = [torch.arange(n * 4).view(n, 2, 2) + 100 * n for n in (3, 1, 2)]
    jagged = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    assert torch.equal(flatten(jagged, None), torch.cat(rows))
    padded = flatten(jagged, 3).view(3, 3, 2, 2)
    for row, found in zip(rows, padded, strict=True):
        assert torch.equal(found[: len(row)], row) and not found[len(row) :].any()


MISFITS = [
    # what is recorded for three tokens, and the message
    (None, "the batch has no routed_experts: the rollout did not return them"),
    (torch.zeros(2, 2, TOP_K), r"shape \(2, 2, 2\), but the actor has 3 tokens, 2 layers and 2 experts a token"),
    (torch.zeros(3, 1, TOP_K), r"shape \(3, 1, 2\)"),
    (torch.zeros(3, 2, 4), r"shape \(3, 2, 4\)"),
]


@pytest.mark.parametrize(("recorded", "message"), MISFITS)
def test_what_is_not_of_this_model_is_refused(recorded, message):
    _, replay = router_of()
    with pytest.raises(ValueError, match=message):
        replay.begin(recorded, 3)
    with replay.paused():
        replay.begin(None, 3)


def test_models_without_a_choice_to_replay():
    _, dense = make_model("Qwen3ForCausalLM")
    with pytest.raises(ValueError, match="enable_rollout_routing_replay=True: the model has no experts"):
        RoutingReplay(dense, ())
    with pytest.raises(ValueError, match="the model sends a token to one expert"):
        router_of(num_experts_per_tok=1)
