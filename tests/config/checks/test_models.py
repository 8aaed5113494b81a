"""Model folders on this machine are looked at before anything is quantized."""

import json
import re
import shutil

import pytest
from omegaconf import OmegaConf

from qerl_verl.config.checks import models
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.quickstart.tiny_model import build_tokenizer
from tests.helpers.tiny_families import YARN, make_config, make_family


@pytest.mark.parametrize(
    ("arm", "fused", "settings", "refused"),
    [
        ("bf16", True, {"tie_word_embeddings": False}, False),
        ("nvfp4", True, {"logits_scaling": 8.0}, False),
        ("nvfp4", True, {"final_logit_softcapping": 30.0}, True),
        ("bf16", True, {"final_logit_softcapping": 30.0}, True),
        ("bf16", False, {"final_logit_softcapping": 30.0}, False),
    ],
)
def test_the_output_layer_of_fused_kernels_caps_no_logits(tmp_path, arm, fused, settings, refused):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    model = {"path": str(tmp_path), "use_fused_kernels": fused}
    config = OmegaConf.create({"qerl": {"arm": arm}, "actor_rollout_ref": {"model": model}})
    problems = models.fused_kernel_problems(config)
    assert bool(problems) == refused
    assert not refused or "final_logit_softcapping=30.0" in problems[0] and "use_fused_kernels=False" in problems[0]


def run_of(model, **changes):
    """Returns a configuration of an actor alone, as far as the checks read it."""
    values = {
        "target_modules": "all-linear",
        "exclude_modules": None,
        "lora_adapter_path": None,
        "tokenizer_path": None,
    }
    values |= {"path": str(model), "use_fused_kernels": False, "trust_remote_code": False, **changes}
    return OmegaConf.create({"actor_rollout_ref": {"model": values}, "critic": {"enable": False}})


def test_a_folder_that_fits_has_no_problems(bf16_checkpoint, nvfp4_checkpoint):
    assert models.find_problems(run_of(bf16_checkpoint)) == models.find_problems(run_of(nvfp4_checkpoint)) == []
    assert models.find_problems(run_of("Qwen/not-here")) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_modules": ["wq"]}, "actor_rollout_ref.model.target_modules: wq is none of the linear layers"),
        (
            {"target_modules": "q_proj"},
            "actor_rollout_ref.model.target_modules=q_proj: a string is a regular expression",
        ),
        ({"exclude_modules": "wq"}, "actor_rollout_ref.model.exclude_modules: wq matches no layer"),
        ({"tokenizer_path": "{empty}"}, "actor_rollout_ref.model.tokenizer_path={empty}: no tokenizer"),
    ],
)
def test_what_does_not_fit_a_local_model_is_named(bf16_checkpoint, tmp_path, changes, expected):
    (tmp_path / "config.json").write_text((bf16_checkpoint / "config.json").read_text())
    changes = {name: v.format(empty=tmp_path) if isinstance(v, str) else v for name, v in changes.items()}
    (problem,) = models.find_problems(run_of(bf16_checkpoint, **changes))
    assert problem.startswith(expected.format(empty=tmp_path))


def test_a_folder_that_cannot_be_read_is_one_problem(tmp_path, bf16_checkpoint):
    shutil.copytree(bf16_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    for expected in ("holds no weights", "not valid JSON", "no such file"):
        (problem,) = models.find_problems(run_of(tmp_path / "model"))
        assert problem.startswith(f"actor_rollout_ref.model.path={tmp_path / 'model'}: ") and expected in problem
        file = tmp_path / "model" / "config.json"
        file.write_text("{") if expected == "holds no weights" else file.unlink(missing_ok=True)
        (tmp_path / "model" / "tokenizer.json").unlink(missing_ok=True)  # one thing at a time


def test_an_adapter_that_the_plan_has_read_is_looked_at(bf16_checkpoint, tmp_path):
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "wanted": {}}
    config = run_of(bf16_checkpoint, lora_adapter_path=str(tmp_path))
    (problem,) = models.find_problems(config, {"actor_rollout_ref.model": adapter})
    assert "neither adapter_model.safetensors nor adapter_model.bin is there" in problem


@pytest.mark.parametrize(
    ("positions", "longest", "expected"),
    [
        (512, None, None),
        (512, 512, None),
        (512, 1024, "max_model_len=1024: the model has 512 positions; set it to 512 or less"),
        (None, 1024, None),
    ],
)
def test_a_length_beyond_the_models_positions_is_refused(tmp_path, positions, longest, expected):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
    actor = {"model": {"path": str(tmp_path)}, "rollout": {"max_model_len": longest}}
    config = OmegaConf.create({"actor_rollout_ref": actor})
    problems = models.length_problems(config)
    assert len(problems) == (expected is not None), problems
    assert not problems or expected in problems[0]


LLAMA_4 = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.1
)
POSITIONS = [
    ("Phi3ForCausalLM", {}, 128, None),
    ("Phi3ForCausalLM", {}, 129, "max_model_len=129: .* up to 128 .* long factors .* Set it to 128 or less"),
    (
        "Phi3ForCausalLM",
        {},
        None,
        "max_model_len=None: .* Set it to 128 or less",
    ),  # verl takes the model's positions then
    ("Ministral3ForCausalLM", {}, 64, None),
    ("Ministral3ForCausalLM", {}, 65, "max_model_len=65: .* up to 64 .* llama_4_scaling_beta, and vLLM does not"),
    ("Ministral3ForCausalLM", {"rope_parameters": LLAMA_4 | {"llama_4_scaling_beta": 0.0}}, 256, None),
    ("Olmo3ForCausalLM", {}, 256, None),
    ("Gemma3ForCausalLM", {}, 256, None),
    (
        "LlamaForCausalLM",
        {"rope_parameters": dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)},
        8,
        "rope_type dynamic",
    ),
]


@pytest.mark.parametrize(("name", "changes", "longest", "expected"), POSITIONS)
def test_lengths_at_which_actor_and_rollout_rotate_in_different_ways(tmp_path, name, changes, longest, expected):
    make_config(name, **changes).save_pretrained(tmp_path)
    actor = {"model": {"path": str(tmp_path)}, "rollout": {"max_model_len": longest}}
    problems = models.position_problems(OmegaConf.create({"actor_rollout_ref": actor}))
    assert len(problems) == (expected is not None), problems
    assert not problems or re.search(expected, problems[0])


@pytest.mark.parametrize(
    ("engine", "rope", "refused"),
    [("0.24.0", YARN, True), ("0.28.0", YARN, False), ("0.24.0", {"rope_type": "default", "rope_theta": 1e4}, False)],
)
def test_olmo_3_with_scaled_positions_needs_a_vllm_that_scales_all_layers(tmp_path, engine, rope, refused):
    make_config("Olmo3ForCausalLM", rope_parameters=rope).save_pretrained(tmp_path)
    actor = {"model": {"path": str(tmp_path)}, "rollout": {"max_model_len": 64}}
    problems = models.position_problems(OmegaConf.create({"actor_rollout_ref": actor}), lambda name: engine)
    assert len(problems) == refused
    assert not refused or "vLLM before 0.28 to those without a sliding window alone" in problems[0]


@pytest.mark.parametrize(
    ("name", "critic", "refused"),
    [
        ("Gemma3ForCausalLM", True, True),
        ("GraniteForCausalLM", True, True),
        ("Phi3ForCausalLM", True, False),
        ("Olmo3ForCausalLM", False, False),
    ],
)
def test_a_critic_needs_a_token_classification_model(tmp_path, name, critic, refused):
    make_config(name).save_pretrained(tmp_path)
    values = {"critic": {"enable": critic, "model": {"path": str(tmp_path)}}}
    problems = models.critic_problems(OmegaConf.create(values))
    assert len(problems) == refused
    assert not refused or f"critic.model.path={tmp_path}: transformers has no token classification" in problems[0]


@pytest.mark.parametrize(
    ("name", "packed", "attention", "refused"),
    [
        ("Ministral3ForCausalLM", True, None, True),
        ("Ministral3ForCausalLM", True, "flash_attention_2", True),
        ("Ministral3ForCausalLM", True, "qerl_packed", False),
        ("Ministral3ForCausalLM", True, "sdpa", False),
        ("Ministral3ForCausalLM", False, "flash_attention_2", False),
        ("MistralForCausalLM", True, "flash_attention_2", False),
    ],
)
def test_sequences_that_would_attend_to_each_other(tmp_path, name, packed, attention, refused):
    make_config(name).save_pretrained(tmp_path)
    run = run_of(tmp_path, use_remove_padding=packed, override_config={"attn_implementation": attention})
    problems = models.packing_problems(run)
    assert len(problems) == refused
    assert not refused or "Ministral3ForCausalLM tells flash-attn nothing of the sequences in one row" in problems[0]


DELTA_NETS = [
    # settings, version of vLLM, and the message
    ({}, "0.28.0", None),
    (
        {"use_remove_padding": True},
        "0.28.0",
        "use_remove_padding=True: a delta net's state would run from one sequence",
    ),
    ({}, "0.24.0", "vLLM 0.24.0 has no Qwen3_5ForCausalLM, which vLLM 0.28 has"),
    ({"arm": "nf4"}, "0.28.0", "the arm nf4 does not serve Qwen3_5ForCausalLM"),
    ({"ulysses": 2}, "0.28.0", "ulysses_sequence_parallel_size=2: sequence parallelism needs packed rows"),
    ({"device": "cpu", "dtype": "float32"}, "0.28.0", "set actor_rollout_ref.rollout.dtype=bfloat16"),
    ({"device": "cpu", "dtype": "bfloat16"}, "0.28.0", None),
    ({"without": "torchvision"}, "0.28.0", "Qwen3_5ForCausalLM needs torchvision, also for texts"),
    ({"device": "cuda", "dtype": "float16"}, "0.28.0", None),
]


@pytest.mark.parametrize(("settings", "vllm", "message"), DELTA_NETS)
def test_what_cannot_run_a_model_with_delta_nets(tmp_path, monkeypatch, settings, vllm, message):
    make_config("Qwen3_5ForCausalLM").save_pretrained(tmp_path)
    present = not settings.get("without")
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda package: present or None)
    config = run_of(tmp_path, use_remove_padding=settings.get("use_remove_padding", False))
    actor = {"ulysses_sequence_parallel_size": settings.get("ulysses", 1)}
    values = {
        "qerl": {"arm": settings.get("arm", "nvfp4")},
        "trainer": {"device": settings.get("device", "cuda")},
        "actor_rollout_ref": {"actor": actor, "rollout": {"dtype": settings.get("dtype", "bfloat16")}},
    }
    problems = models.delta_net_problems(OmegaConf.merge(config, values), lambda package: vllm)
    assert len(problems) == (message is not None)
    assert not problems or message in problems[0]


@pytest.mark.parametrize(
    ("settings", "device", "refused"),
    [
        ({"hidden_size": 64, "num_attention_heads": 4}, "cpu", True),
        ({"hidden_size": 64, "num_attention_heads": 4}, "cuda", False),
        ({"hidden_size": 64, "num_attention_heads": 2}, "cpu", False),
        ({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 128}, "cpu", False),
        ({"hidden_size": 64, "num_attention_heads": 2, "head_dim": 48}, "cpu", True),
        ({}, "cpu", False),
    ],
)
def test_heads_that_vllm_has_no_cpu_kernel_for(tmp_path, settings, device, refused):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = OmegaConf.create({"trainer": {"device": device}, "actor_rollout_ref": {"model": {"path": str(tmp_path)}}})
    problems = models.head_size_problems(config)
    assert bool(problems) == refused
    assert not refused or "no kernel on a CPU" in problems[0] and "32, 64, 80" in problems[0]


def test_the_widths_of_heads_are_vllms():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == models.CPU_HEAD_SIZES


@pytest.mark.parametrize(
    ("name", "arm", "path", "expected"),
    [
        ("Glm4ForCausalLM", "nvfp4", "punica", "takes adapters of gate_proj and up_proj; set qerl.rollout.lora=inline"),
        ("Glm4ForCausalLM", "nvfp4", "inline", None),
        ("Glm4ForCausalLM", "bf16", None, "takes adapters of gate_proj and up_proj; use \\+qerl=nvfp4"),
        ("SmolLM3ForCausalLM", "nvfp4", "punica", "through transformers' code"),
        ("SmolLM3ForCausalLM", "bf16", None, None),
        ("Gemma3ForCausalLM", "nvfp4", "punica", None),
    ],
)
def test_vllms_own_lora_path_does_not_serve_every_family(tmp_path, name, arm, path, expected):
    make_config(name).save_pretrained(tmp_path)
    values = {"qerl": {"arm": arm, "rollout": {"lora": path}}, "actor_rollout_ref": {"model": {"path": str(tmp_path)}}}
    problems = models.vllm_lora_problems(OmegaConf.create(values))
    assert len(problems) == (expected is not None)
    assert not problems or re.search(expected, problems[0])


REPLAYS = [
    # model, its changes, arm, device, and the message
    ("Qwen3MoeForCausalLM", {}, "nvfp4", "cpu", None),
    ("Qwen3MoeForCausalLM", {}, "bf16", "cuda", None),
    ("Qwen3MoeForCausalLM", {}, "bf16", "cpu", "vLLM's CPU engine does not return the experts of the arm bf16"),
    ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 1}, "nvfp4", "cuda", "the model sends a token to one expert"),
    (
        "Qwen3ForCausalLM",
        {},
        "nvfp4",
        "cuda",
        "Qwen3ForCausalLM has no experts whose routing could be replayed; remove it",
    ),
]


@pytest.mark.parametrize(("name", "changes", "arm", "device", "message"), REPLAYS)
def test_where_the_rollouts_routing_can_be_replayed(tmp_path, name, changes, arm, device, message):
    make_config(name, **changes).save_pretrained(tmp_path)
    config = OmegaConf.create(
        {
            "qerl": {"arm": arm},
            "trainer": {"device": device},
            "actor_rollout_ref": {"model": {"path": str(tmp_path)}, "rollout": {"enable_rollout_routing_replay": True}},
        }
    )
    problems = models.replay_problems(config)
    assert len(problems) == (message is not None) and all(message in problem for problem in problems)
    config.actor_rollout_ref.rollout.enable_rollout_routing_replay = False
    assert models.replay_problems(config) == []


def test_a_mixture_of_experts_has_no_problems(tmp_path):
    """In 16 bits and packed; an adapter goes to the attention, and by name to all linears of the
    experts."""
    build_tokenizer().save_pretrained(make_family("Qwen3MoeForCausalLM", tmp_path / "source"))
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed", progress=False)
    for folder in (tmp_path / "source", tmp_path / "packed"):
        assert models.find_problems(run_of(folder)) == []
        experts = ["gate_proj", "up_proj", "down_proj"]
        assert models.find_problems(run_of(folder, target_modules=["q_proj", *experts])) == []
        for targets, message in (
            (["q_proj", "down_proj"], r"4 of the 12 linears of the experts .* name gate_proj, up_proj, down_proj,"),
            (
                ["q_proj", "gate"],
                r"target_modules: gate is none of the linear layers\. The model has q_proj, .*down_proj;",
            ),
            (".*(q|gate|up|down)_proj", r"not by an expression; give a list, \[q_proj,gate_proj,up_proj,down_proj\]"),
        ):
            (problem,) = models.find_problems(run_of(folder, target_modules=targets))
            assert re.search(message, problem), problem
            assert problem.endswith("(routers, and the MLPs of layers without experts, have no adapter)")
    config = run_of(tmp_path / "source", target_modules=["q_proj", *experts])
    (problem,) = models.find_problems(OmegaConf.merge(config, {"qerl": {"arm": "bf16"}}))
    assert "the arm bf16 has no adapter on the experts" in problem and "take gate_proj" in problem


@pytest.mark.parametrize(
    ("name", "arm", "refused"),
    [
        ("Qwen3MoeForCausalLM", "nf4", True),
        ("Qwen3MoeForCausalLM", "nvfp4", False),
        ("Qwen3MoeForCausalLM", "mxfp4", False),
        ("Qwen3MoeForCausalLM", "bf16", False),
        ("Qwen3ForCausalLM", "nf4", False),
    ],
)
def test_an_arm_that_would_leave_experts_in_16_bits(tmp_path, name, arm, refused):
    make_config(name).save_pretrained(tmp_path)
    config = run_of(tmp_path)
    config.qerl = {"arm": arm}
    problems = models.expert_problems(config)
    assert bool(problems) == refused
    assert not refused or str(tmp_path) in problems[0] and "+qerl=nvfp4" in problems[0]


PARALLEL = [
    ("Qwen2ForCausalLM", {"intermediate_size": 128}, 2, "nvfp4", None),
    ("Qwen2ForCausalLM", {}, 1, "nvfp4", None),
    ("Qwen2ForCausalLM", {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 896}, 8, "bf16",
     "28 attention heads (4 of keys and values) cannot be divided among so many GPUs; set it to 1 or 2 or 4 or 28"),
    ("Qwen2ForCausalLM", {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 192}, 3, "nvfp4",
     "6 attention heads (2 of keys and values)"),
    ("Qwen2ForCausalLM", {}, 4, "nvfp4", "28 input channels of mlp.down_proj, which are not whole blocks of 16; set it to 1"),
    ("Qwen2ForCausalLM", {}, 4, "bf16", None),
    ("Qwen3MoeForCausalLM", {"moe_intermediate_size": 64}, 4, "nvfp4", None),
    ("Qwen3MoeForCausalLM", {}, 4, "nvfp4", "12 input channels of down_proj of an expert, which are not whole blocks of 16"),
    ("Qwen3MoeForCausalLM", {}, 4, "nvfp4 and whole experts", None),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "changes", "size", "arm", "expected"), PARALLEL)
def test_a_model_that_the_gpus_of_an_engine_cannot_divide(tmp_path, architecture, changes, size, arm, expected):
    make_config(architecture, **changes).save_pretrained(tmp_path)
    config = run_of(tmp_path)
    arm, _, whole_experts = arm.partition(" and ")
    config.qerl = {"arm": arm}
    config.actor_rollout_ref.rollout = {
        "tensor_model_parallel_size": size,
        "expert_parallel_size": size if whole_experts else 1,
    }
    problems = models.tensor_parallel_problems(config)
    assert len(problems) == (expected is not None), problems
    assert expected is None or f"tensor_model_parallel_size={size}: " in problems[0] and expected in problems[0]
