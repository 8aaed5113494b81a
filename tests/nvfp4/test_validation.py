"""Tests the checks of NVFP4 checkpoints, ours and other tools'."""

import json
import math
import re

import pytest
import torch

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.cache import resolve_checkpoint
from qerl_verl.nvfp4.checkpoint_files import read_config
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import QUANTIZATION_CONFIG
from qerl_verl.nvfp4.loading import iterate_tensors
from qerl_verl.nvfp4.model_shapes import linear_shapes, tower_linears
from qerl_verl.nvfp4.validation import check_checkpoint, validate_nvfp4_checkpoint
from tests.helpers.checkpoint_folders import edit_config, edit_weights, load, quantized

Q0 = "model.layers.0.self_attn.q_proj"
MOE = "Qwen3MoeForCausalLM"
EXPERT = "model.layers.0.mlp.experts.2"
ROUTER = "model.layers.0.mlp.gate"


def test_validate_accepts_activation_scales_and_scalars(make_checkpoint, tmp_path):
    """Other tools write input_global_scale beside the weights, and global scales without a
    dimension."""
    _, dst = quantized(make_checkpoint, tmp_path)

    def change(tensors):
        for name in [n for n in tensors if n.endswith("weight_global_scale")]:
            tensors[name] = tensors[name].reshape(())
            tensors[name.replace("weight_", "input_")] = torch.ones(1)

    edit_weights(dst, change)
    validate_nvfp4_checkpoint(dst)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda t: t.pop(f"{Q0}.weight_scale"), f"{Q0}.weight_scale"),
        (lambda t: t.pop("model.layers.1.input_layernorm.weight"), "model.layers.1.input_layernorm.weight"),
        (lambda t: t.__setitem__(f"{Q0}.weight_packed", t[f"{Q0}.weight_packed"][:-1].clone()), "shape [127, 64]"),
        (lambda t: t.__setitem__(f"{Q0}.weight_scale", t[f"{Q0}.weight_scale"].bfloat16()), "BF16"),
        (lambda t: t.__setitem__(f"{Q0}.weight", torch.zeros(64, 64).bfloat16()), f"{Q0} is in 16 bits, but ignore"),
    ],
)
def test_validate_names_what_is_wrong(make_checkpoint, tmp_path, change, named):
    _, dst = quantized(make_checkpoint, tmp_path)
    edit_weights(dst, change)
    with pytest.raises(CheckpointError) as error:
        validate_nvfp4_checkpoint(dst)
    assert named in str(error.value)


def fill(name, value):
    return lambda t: t[name].fill_(value)


def fill_byte(name, code):
    def change(tensors):
        tensors[name].view(torch.uint8)[3, 1] = code

    return change


SCALE, GLOBAL = f"{Q0[:-6]}o_proj.weight_scale", f"{Q0[:-6]}o_proj.weight_global_scale"
UNSOUND = [
    (fill(GLOBAL, math.inf), f"tensor {GLOBAL} is inf; it divides the weight"),
    (fill(GLOBAL, -2.0), f"tensor {GLOBAL} is -2; it divides the weight"),
    (fill(GLOBAL, math.nan), f"tensor {GLOBAL} is nan; it divides the weight"),
    (fill(GLOBAL, 0.0), f"tensor {GLOBAL} is 0; it divides the weight"),
    # its reciprocal is infinite
    (fill(GLOBAL, 1e-40), f"tensor {GLOBAL} is 9.99995e-41; it divides the weight"),
    (fill_byte(SCALE, 0x7F), f"tensor {SCALE} holds 1 NaN and 0 negative scales"),
    (fill_byte(SCALE, 0xFF), f"tensor {SCALE} holds 1 NaN and 0 negative scales"),
    (fill_byte(SCALE, 0x81), f"tensor {SCALE} holds 0 NaN and 1 negative scales"),
    (fill("model.norm.weight", math.nan), "tensor model.norm.weight holds NaN or Inf"),
    (fill(f"{Q0}.bias", -math.inf), f"tensor {Q0}.bias holds NaN or Inf"),
]
"""Changes of an NVFP4 checkpoint, and what the message says."""


@pytest.mark.parametrize("change, named", UNSOUND)
def test_values_that_are_no_weights_are_refused_by_name(make_checkpoint, tmp_path, change, named):
    _, dst = quantized(make_checkpoint, tmp_path)
    edit_weights(dst, change)
    with pytest.raises(CheckpointError, match=re.escape(named)):
        resolve_checkpoint(dst, tmp_path / "cache")


@pytest.mark.parametrize("code", [0x00, 0x01, 0x7E, 0x80])
def test_every_scale_that_is_a_number_and_not_negative_is_taken(make_checkpoint, tmp_path, code):
    _, dst = quantized(make_checkpoint, tmp_path)
    edit_weights(dst, fill_byte(SCALE, code))
    validate_nvfp4_checkpoint(dst)


def grouped(**changes):
    group = QUANTIZATION_CONFIG["config_groups"]["group_0"]
    return QUANTIZATION_CONFIG | {"config_groups": {"group_0": group | changes}}


LEFT_OUT = [
    (QUANTIZATION_CONFIG | {"ignore": ["lm_head", f"{Q0}"]}, f"{Q0} is packed, but ignore in config.json names it"),
    (QUANTIZATION_CONFIG | {"ignore": ["re:.*mlp.*"]}, r"mlp\.\w+_proj is packed, but ignore in config.json names it"),
    (grouped(targets=["re:.*self_attn.*"]), r"mlp.gate_proj is packed, but .* have the targets re:\.\*self_attn"),
    (QUANTIZATION_CONFIG | {"ignore": ["re:.*lm_head", "model.embed_tokens"]}, None),
    (grouped(targets=["re:.*self_attn.*", "re:.*mlp.*"]), None),
]
"""``quantization_config`` and what the message says."""


@pytest.mark.parametrize("quantization, expected", LEFT_OUT)
def test_a_packed_linear_that_the_configuration_leaves_out(make_checkpoint, tmp_path, quantization, expected):
    _, dst = quantized(make_checkpoint, tmp_path)
    edit_config(dst, quantization_config=quantization)
    if expected is None:
        return validate_nvfp4_checkpoint(dst)
    with pytest.raises(CheckpointError, match=expected):
        validate_nvfp4_checkpoint(dst)


KV_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@pytest.mark.parametrize("scales", [(), ("k_scale", "v_scale"), ("k_proj.output_scale", "v_proj.output_scale")])
def test_a_scheme_for_the_kv_cache_is_left_out_and_that_is_noted(make_checkpoint, tmp_path, scales):
    _, dst = quantized(make_checkpoint, tmp_path)
    edit_config(dst, quantization_config=QUANTIZATION_CONFIG | {"kv_cache_scheme": KV_SCHEME})
    names = [f"model.layers.{i}.self_attn.{scale}" for i in range(2) for scale in scales]
    edit_weights(dst, lambda t: t.update({name: torch.ones(2) for name in names}))
    (note,) = resolve_checkpoint(dst, tmp_path / "cache").notes
    assert note.startswith("kv_cache_scheme (8-bit float) of the checkpoint is not used")
    edit_config(dst, quantization_config=QUANTIZATION_CONFIG)
    assert resolve_checkpoint(dst, tmp_path / "cache").notes == ()


def test_validate_refuses_16_bit(make_checkpoint):
    with pytest.raises(CheckpointError, match="qerl quantize"):
        validate_nvfp4_checkpoint(make_checkpoint())


def test_a_packed_checkpoint_with_published_names_and_one_flat_config(make_checkpoint, tmp_path):
    """Qwen2.5-VL's published checkpoints have older names. llm-compressor names each linear of the
    tower in ``ignore``, and the decoder's settings are at the top of config.json.
    """
    _, dst = quantized(make_checkpoint, tmp_path, "Qwen2_5_VLForConditionalGeneration")
    modules, row = load(dst), get_architecture({"architectures": ["Qwen2_5_VLForConditionalGeneration"]})
    older = {now: old for old, now in row.older_names.items()}

    def published(name):
        return next((old + name.removeprefix(now) for now, old in older.items() if name.startswith(now)), name)

    edit_weights(dst, lambda tensors: tensors.update({published(n): tensors.pop(n) for n in list(tensors)}))
    config = json.loads((dst / "config.json").read_text())
    decoder = config.pop("text_config")
    rope = decoder.pop("rope_parameters")
    decoder |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    tower = [published(name) for name in tower_linears(dst)]
    config["quantization_config"]["ignore"] = ["lm_head", *tower]
    unnamed = {key: value for key, value in decoder.items() if key not in ("model_type", "layer_types")}
    (dst / "config.json").write_text(json.dumps(config | unnamed))

    assert set(load(dst)) != set(modules)
    assert check_checkpoint(dst) == "nvfp4"
    assert set(modules) == {name for name, _ in iterate_tensors(dst)}
    assert linear_shapes(dst)[f"{row.layer_prefix}0.mlp.down_proj"] == (128, 112)
    edit_config(
        dst, quantization_config=config["quantization_config"] | {"ignore": [*tower, "model.layers.0.mlp.up_proj"]}
    )
    with pytest.raises(CheckpointError, match=r"language_model.layers.0.mlp.up_proj is packed, but ignore"):
        check_checkpoint(dst)


def test_a_checkpoint_of_llm_compressor_with_experts(make_checkpoint, tmp_path):
    """``ignore`` has expressions, gate and up have separate scales, W4A4 has activation scales, and
    the experts of one layer are all left out.
    """
    _, dst = quantized(make_checkpoint, tmp_path, MOE, mlp_only_layers=[])
    config = read_config(dst)["quantization_config"]
    plain = [f"model.layers.1.mlp.experts.{i}.{n}" for i in range(4) for n in ("gate_proj", "up_proj", "down_proj")]

    def change(tensors):
        tensors[f"{EXPERT}.up_proj.weight_global_scale"] *= 2
        tensors[f"{EXPERT}.up_proj.input_global_scale"] = torch.ones(1)
        for linear in plain:
            parts = [tensors.pop(f"{linear}.weight_{part}") for part in ("packed", "scale", "global_scale")]
            tensors[f"{linear}.weight"] = dequantize_nvfp4(*parts)

    edit_weights(dst, change)
    config["ignore"] = ["lm_head", "re:.*mlp.gate$", "re:model.layers.1.mlp.experts.*"]
    edit_config(dst, quantization_config=config)
    validate_nvfp4_checkpoint(dst)
    config["ignore"] = ["lm_head", "re:.*mlp.gate$", *plain[:-1]]
    edit_config(dst, quantization_config=config)
    with pytest.raises(CheckpointError, match=re.escape(plain[-1])):
        validate_nvfp4_checkpoint(dst)


DAMAGED_EXPERTS = [
    ("a packed router", dict(pack=ROUTER), [f"{ROUTER}.weight_packed", "stays in 16 bits"]),
    ("a router that ignore leaves out", dict(ignore=["lm_head"]), [ROUTER, "ignore"]),
    ("one expert in 16 bits", dict(plain=[f"{EXPERT}.{n}_proj" for n in ("gate", "up", "down")]), ["the 12 linears"]),
    ("a missing expert", dict(drop=f"{EXPERT}.down_proj.weight_scale"), [f"{EXPERT}.down_proj.weight_scale"]),
]


HYBRID, NET = "Qwen3_5ForCausalLM", "model.layers.0.linear_attn"
DAMAGED_NETS = [
    ("a packed decay", dict(pack=f"{NET}.in_proj_a"), [f"{NET}.in_proj_a.weight_packed", "this linear of a delta net"]),
    (
        "a decay that ignore leaves out",
        dict(ignore=["lm_head"]),
        [f"this linear {NET}.in_proj_b", "linear_attn.in_proj_b$"],
    ),
    ("a gate in 16 bits", dict(plain=[f"{NET}.in_proj_z"]), [f"{NET}.in_proj_qkv, {NET}.in_proj_z", "vLLM fuses them"]),
    ("a net without its decay", dict(drop=f"{NET}.A_log"), [f"{NET}.A_log is missing"]),
]
DAMAGED = [(MOE, *case) for case in DAMAGED_EXPERTS] + [(HYBRID, *case) for case in DAMAGED_NETS]


@pytest.mark.parametrize("family, change, named", [(c[0], *c[2:]) for c in DAMAGED], ids=[c[1] for c in DAMAGED])
def test_damaged_experts_and_delta_nets(make_checkpoint, tmp_path, family, change, named):
    _, dst = quantized(make_checkpoint, tmp_path, family)
    config = read_config(dst)["quantization_config"]

    def edit(tensors):
        if "pack" in change:
            del tensors[f"{change['pack']}.weight"]
            tensors[f"{change['pack']}.weight_packed"] = torch.zeros(4, 64, dtype=torch.uint8)
        for linear in change.get("plain", ()):
            parts = [tensors.pop(f"{linear}.weight_{part}") for part in ("packed", "scale", "global_scale")]
            tensors[f"{linear}.weight"] = dequantize_nvfp4(*parts)
        tensors.pop(change.get("drop"), None)

    edit_weights(dst, edit)
    config["ignore"] = [*change.get("ignore", config["ignore"]), *change.get("plain", ())]
    edit_config(dst, quantization_config=config)
    with pytest.raises(CheckpointError) as error:
        validate_nvfp4_checkpoint(dst)
    assert all(text in str(error.value) for text in named)
