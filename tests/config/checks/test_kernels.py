"""What an insisted-on kernel does not serve is known from the model's configuration."""

import re

import pytest
from omegaconf import OmegaConf

from qerl_verl.config.checks.kernels import find_problems
from tests.helpers.tiny_families import make_config


def settings(actor="auto", rollout="auto", dtype="bfloat16", param_dtype=None, parallel=1, lora="inline", rank=32):
    mixed = {"param_dtype": param_dtype} if param_dtype else None
    return OmegaConf.create({
        "qerl": {"kernel": actor, "rollout": {"kernel": rollout, "lora": lora}},
        "actor_rollout_ref": {
            "model": {"lora_rank": rank},
            "actor": {"fsdp_config": {"mixed_precision": mixed}},
            "rollout": {"dtype": dtype, "tensor_model_parallel_size": parallel},
        },
    })  # fmt: skip


# The tiny model: hidden 128, MLP 256, 4 heads and 2 key and value heads of 32. So k and v have 64
# rows each.
PROBLEMS = [
    ({}, None),
    ({"actor": "hopper"}, None),
    ({"actor": "triton", "rollout": "marlin"}, None),
    ({"actor": "pytorch", "rollout": "pytorch", "dtype": "float32"}, None),
    (
        {"actor": "hopper", "param_dtype": "fp16"},
        "qerl.kernel=hopper does not serve self_attn.q_proj of 128 x 128: activations have to be bfloat16, got torch.float16; use auto",
    ),
    (
        {"rollout": "hopper", "dtype": "float16"},
        "qerl.rollout.kernel=hopper does not serve self_attn.q_proj, self_attn.k_proj, self_attn.v_proj of 256 x 128: activations",
    ),
    (
        {"rollout": "hopper"},
        "qerl.rollout.kernel=hopper does not take the adapter of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj of 256 x 128: "
        "projections have to end at multiples of 128 rows, got [128, 192, 256]; use auto",
    ),
    ({"rollout": "hopper", "lora": "punica"}, None),
    ({"rollout": "triton"}, None),
    ({"rollout": "hopper", "parallel": 2, "lora": "punica"}, None),
    (
        {"rollout": "hopper", "parallel": 4, "lora": "punica"},
        # 32 of q, and a head of k and of v
        "of 96 x 128: N and K have to be multiples of 64, got 96 x 128; use auto",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "problem"), PROBLEMS)
def test_what_does_not_fit_is_named_with_the_setting(bf16_checkpoint, values, problem):
    found = find_problems(settings(**values), bf16_checkpoint)
    if problem is None:
        assert found == []
    else:
        (only,) = found
        assert re.search(re.escape(problem), only)


def test_a_decoder_behind_a_vision_tower_is_looked_at(tmp_path):
    make_config("Qwen3VLForConditionalGeneration").save_pretrained(tmp_path)
    found = find_problems(settings(actor="hopper", rollout="hopper", lora="punica"), tmp_path)
    assert [re.search(r"(qerl\S+)=hopper does not serve (\S+) ", problem).groups() for problem in found] == [
        ("qerl.kernel", "mlp.gate_proj"),
        ("qerl.rollout.kernel", "mlp.gate_proj,"),
    ]


@pytest.mark.parametrize(
    ("kernel", "parallel", "problem"),
    [
        ("hopper", 1, "mlp.experts of 128 x 128: it has no kernel for experts; use auto"),
        ("hopper", 2, "mlp.experts of 64 x 128: it has no kernel for experts; use auto"),
        ("triton", 1, None),
        ("triton", 2, "mlp.experts of 64 x 128: K has to be a multiple of 64, got 32; use auto"),
        ("marlin", 1, None),
    ],
)
def test_experts_have_kernels_of_their_own(tmp_path, kernel, parallel, problem):
    settings_ = dict(moe_intermediate_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
    make_config("Qwen3MoeForCausalLM", **settings_).save_pretrained(tmp_path)
    found = find_problems(settings(rollout=kernel, parallel=parallel, lora="punica"), tmp_path)
    expected = [f"qerl.rollout.kernel={kernel} does not serve {problem}"]
    assert found == ([] if problem is None else expected)


@pytest.mark.parametrize(
    ("kernel", "lora", "experts", "refused"),
    [
        ("marlin", "inline", True, True),
        ("marlin", "inline", False, False),
        ("triton", "inline", True, False),
        ("auto", "inline", True, False),
    ],
)
def test_marlin_takes_no_adapter_on_the_experts(tmp_path, kernel, lora, experts, refused):
    sizes = dict(moe_intermediate_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=128)
    make_config("Qwen3MoeForCausalLM", **sizes).save_pretrained(tmp_path)
    config = settings(rollout=kernel, lora=lora)
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"] if experts else "all-linear"
    config.actor_rollout_ref.model.target_modules = names
    found = find_problems(config, tmp_path)
    assert len(found) == refused
    assert not refused or "qerl.rollout.kernel=marlin takes no adapter on the experts" in found[0]


def test_of_linears_that_the_checkpoint_fuses_each_projection_ends_by_itself(tmp_path):
    """Also where tensor parallelism divides them: 128 rows of q, 64 of k and 64 of v, on two ranks
    half of each."""
    make_config("Phi3ForCausalLM").save_pretrained(tmp_path)
    (problem,) = find_problems(settings(rollout="hopper"), tmp_path)
    assert (
        "does not take the adapter of self_attn.qkv_proj of 256 x 128: projections have to end at multiples of 128"
        in problem
    )
    assert "got [128, 192, 256]" in problem
    (problem,) = find_problems(settings(rollout="hopper", parallel=2, lora="punica"), tmp_path)
    assert "mlp.gate_up_proj of 112 x 128: N and K have to be multiples of 64" in problem
