"""Tests the estimated memory of a run against measured runs."""

from dataclasses import replace

import pytest

from qerl_verl.memory.estimate import ASLEEP, CONTEXT, GIB, Model, Run, estimate, propose
from qerl_verl.memory.read import model_of

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
SHAPES = {
    "7B": dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    ),
    "32B": dict(
        hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40, num_key_value_heads=8
    ),
    "72B": dict(
        hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
}
H100 = int(79.2 * GIB)
RUN = Run(
    ranks=1,
    parallel=1,
    shared=False,
    recompute="auto",
    tokens=7680,
    sequence=768,
    sequences=128,
    fused_logits=True,
    utilization=0.6,
)


def model(shape: str) -> Model:
    return model_of({**QWEN, **SHAPES[shape]}, 32, "all-linear")


def test_shapes_give_the_known_sizes():
    made = model("7B")
    assert made.adapter == 32 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    parameters = made.packed * 16 / 9
    assert parameters == 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert made.plain == pytest.approx(2 * 2 * 152064 * 3584, rel=0.001)
    assert made.cache_a_token == 2 * 2 * 512 * 28


EXPERTS = {
    **QWEN,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    **dict(vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32),
    **dict(num_key_value_heads=4, head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
}
"""Qwen3-30B-A3B."""


def test_a_mixture_of_experts():
    """30.5 billion parameters take 17 GB. ``inner`` is the sum over the 8 experts of a token, and
    only the attention has adapters.
    """
    made = model_of(EXPERTS, 32, "all-linear")
    expert, attention = 3 * 768 * 2048, 2048 * 4096 * 2 + 2 * 2048 * 512
    assert made.packed * 16 // 9 == 48 * (128 * expert + attention)
    assert made.packed * 16 / 9 + made.plain / 2 == pytest.approx(30.53e9, rel=1e-3)
    assert made.base == pytest.approx(18.1e9, rel=0.01)
    assert made.adapter == 32 * 48 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    assert (made.inner, made.chosen, made.decoded) == (8 * 768, 8, 2 * 128 * 2 * 768 * 2048)
    found = estimate(made, RUN, H100)
    assert found.training["decoded experts"] == made.decoded and not found.problems
    dense = replace(made, chosen=0, decoded=0)
    assert sum(found.training.values()) > sum(estimate(dense, RUN, H100).training.values())
    mixed = model_of({**EXPERTS, "mlp_only_layers": [0], "intermediate_size": 16384}, 32, "all-linear")
    assert mixed.inner == 16384


def test_an_adapter_on_the_experts():
    """1.7 billion parameters at rank 32: optimizer and gradients in float32, and a copy in the
    rollout."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    made, alone = model_of(EXPERTS, 32, targets), model_of(EXPERTS, 32, "all-linear")
    assert made.of_experts == 48 * 128 * 3 * 32 * (2048 + 768) == made.adapter - alone.adapter
    assert alone.of_experts == 0
    run = replace(RUN, ranks=1, shared=False)
    found, without = estimate(made, run, 80 * GIB), estimate(alone, run, 80 * GIB)
    assert found.training["optimizer"] - without.training["optimizer"] == 8 * made.of_experts
    assert found.generating["rollout's adapter"] == 2 * made.of_experts
    assert "rollout's adapter" not in without.generating


def test_linears_that_a_checkpoint_fuses_count_once():
    sizes = SHAPES["7B"] | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = model_of({**QWEN, **sizes, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3"}, 32, "all-linear")
    assert (made.query, made.key, made.packed) == (3584, 512, model("7B").packed)
    assert made.adapter == 32 * 28 * ((3584 + 4608) + 2 * 3584 + (3584 + 2 * 18944) + (18944 + 3584))


@pytest.mark.parametrize(
    ("shape", "run", "elsewhere", "measured", "kept", "kept_gib"),
    [
        # gsm8k_grpo_32b on one H100, 10 sequences of 768 tokens a micro-batch: the card's peak by
        # nvidia-smi
        ("32B", RUN, 0, 75.0, 42, 40.5),
        # GRPO of 7B on one GPU with flash-attn's cross entropy, 16 sequences a micro-batch: the
        # actor's peak by PyTorch
        ("7B", replace(RUN, tokens=12288, fused_logits=False), ASLEEP + CONTEXT, 49.0, 28, 29.5),
    ],
)
def test_a_measured_peak_is_predicted_within_ten_percent(shape, run, elsewhere, measured, kept, kept_gib):
    found = estimate(model(shape), run, H100)
    assert (sum(found.training.values()) - elsewhere) / GIB == pytest.approx(measured, rel=0.1)
    assert found.kept_layers == pytest.approx(kept, rel=0.1)
    assert found.training["kept outputs"] / GIB == pytest.approx(kept_gib, rel=0.1)
    assert not found.problems


def test_one_copy_saves_the_rollouts_base_on_gpu_and_host():
    two, one = (estimate(model("32B"), replace(RUN, shared=shared), H100) for shared in (False, True))
    base = model("32B").base
    assert two.generating["rollout's base"] == two.host["rollout's base while it sleeps"] == base
    assert one.generating["rollout's base"] == 0 and not one.host
    assert one.cache_tokens - two.cache_tokens == pytest.approx(base / model("32B").cache_a_token, abs=1)


def test_ranks_divide_what_is_sharded_and_a_shared_base_is_whole_on_each():
    separate, shared = (estimate(model("7B"), replace(RUN, ranks=4, shared=s), H100) for s in (False, True))
    assert separate.training["base"] * 4 == pytest.approx(model("7B").base, abs=4)
    assert shared.training["base"] == model("7B").base and "gathered layers" not in shared.training
    assert shared.training["optimizer"] * 4 == pytest.approx(8 * model("7B").adapter, abs=8)


def test_offload_empties_the_gpu_while_it_generates_alone():
    offloaded = estimate(model("7B"), replace(RUN, param_offload=True, optimizer_offload=True), H100)
    stays = estimate(model("7B"), RUN, H100)
    assert offloaded.training["base"] == stays.training["base"]
    assert sum(offloaded.generating[p] for p in ("base", "adapters", "optimizer")) == 0
    assert offloaded.host["actor's parameters"] == model("7B").base + 4 * model("7B").adapter


def test_what_does_not_fit_is_told_and_the_proposal_fits():
    large = replace(RUN, recompute="full", tokens=16384, sequence=1536)
    found = estimate(model("72B"), large, H100)
    assert any(problem.startswith("generating takes") for problem in found.problems)
    proposed = propose(model("72B"), large, H100)
    assert proposed[0] == "qerl.base=shared"
    values = dict(change.split("=") for change in proposed)
    utilization = float(values["actor_rollout_ref.rollout.gpu_memory_utilization"])
    tokens = int(values.get("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", large.tokens))
    offload = "actor_rollout_ref.actor.fsdp_config.optimizer_offload" in values
    fits = replace(large, shared=True, utilization=utilization, tokens=tokens, optimizer_offload=offload)
    assert not estimate(model("72B"), fits, H100).problems
    assert propose(model("72B"), large, 24 * GIB) is None


def test_a_run_that_fits_needs_no_change():
    assert propose(model("7B"), RUN, H100) == []
