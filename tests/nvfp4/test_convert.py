"""Tests that ModelOpt's and compressed-tensors' MXFP4 checkpoints convert to NVFP4 ones with the
same weights."""

import json

import pytest
import torch
from accelerate import init_empty_weights
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qerl_verl.export.merge import Base
from qerl_verl.kernels.nvfp4_dequantize import E2M1_VALUES
from qerl_verl.nvfp4.cache import resolve_checkpoint
from qerl_verl.nvfp4.convert import convert_checkpoint, foreign_format
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import read_ignore
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, swap_linears
from qerl_verl.nvfp4.model_shapes import linear_shapes
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.safetensors_stream import read_tensor
from qerl_verl.nvfp4.validation import check_checkpoint, unused_settings, validate_nvfp4_checkpoint
from tests.helpers.tiny_families import make_family

CPU = torch.device("cpu")
LINEARS = [
    f"model.layers.{i}.{name}_proj"
    for i in range(2)
    for name in (*(f"self_attn.{p}" for p in "qkvo"), *(f"mlp.{p}" for p in ("gate", "up", "down")))
]
MODELOPT = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}


def rewrite(source, folder, change_config, change_tensors, files=()):
    """Returns a copy of a checkpoint with another config.json and other tensors."""
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    change_config(config)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    change_tensors(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files:
        (folder / name).write_text(json.dumps(content))
    for file in source.iterdir():
        if file.name.startswith("tokenizer"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def modelopt(source, folder, plain=(), settings=None, in_config=False, change=lambda tensors: None, linears=LINEARS):
    """Returns our NVFP4 checkpoint under ModelOpt's names, with ``plain`` linears decoded to
    bfloat16."""
    base = Base(source)

    def tensors(found):
        for linear in linears:
            packed, scale, divisor = (
                found.pop(f"{linear}.weight_{part}") for part in ("packed", "scale", "global_scale")
            )
            if linear in plain:
                found[f"{linear}.weight"] = base.weight(linear, CPU).bfloat16()
                continue
            found[f"{linear}.weight"], found[f"{linear}.weight_scale"] = packed, scale
            found[f"{linear}.weight_scale_2"] = (1.0 / divisor).reshape(())
            found[f"{linear}.input_scale"] = torch.tensor(0.01)
        change(found)

    quantization = {"quantization": {**MODELOPT, **(settings or {})}}

    def config(content):
        del content["quantization_config"]
        if in_config:
            content["quantization_config"] = {"quant_method": "modelopt", **quantization["quantization"]}

    return rewrite(source, folder, config, tensors, () if in_config else [("hf_quant_config.json", quantization)])


def mxfp4(source, folder, change=lambda tensors: None):
    """Returns a bfloat16 checkpoint in compressed-tensors' MXFP4, by its own compressor."""
    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    decoded = {}

    def tensors(found):
        for linear in LINEARS:
            weight = found.pop(f"{linear}.weight").float()
            amax = weight.unflatten(1, (-1, 32)).abs().amax(-1)
            scale = torch.exp2(torch.floor(torch.log2(amax)) - 2)
            state = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
            found |= {f"{linear}.{name}": tensor for name, tensor in state.items() if tensor is not None}
            values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])
            codes = torch.stack((state["weight_packed"] & 15, state["weight_packed"] >> 4), -1).flatten(1)
            decoded[linear] = values[codes.int()] * scale.repeat_interleave(32, 1)
        change(found)

    def config(content):
        weights = {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group", "symmetric": True}
        content["quantization_config"] = {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"],
        }

    return rewrite(source, folder, config, tensors), decoded


@pytest.mark.parametrize("in_config", [False, True])
def test_modelopt_decodes_to_the_same_weights(nvfp4_checkpoint, tmp_path, in_config):
    source = modelopt(nvfp4_checkpoint, tmp_path / "m", in_config=in_config)
    assert foreign_format(source) == "modelopt" and check_checkpoint(source) == "modelopt"
    convert_checkpoint(source, tmp_path / "n", progress=False)
    validate_nvfp4_checkpoint(tmp_path / "n")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "n" / "model.safetensors")
    original, converted = Base(nvfp4_checkpoint), Base(tmp_path / "n")
    for linear in LINEARS:
        assert torch.equal(after[f"{linear}.weight_packed"], before[f"{linear}.weight"])
        assert torch.equal(
            after[f"{linear}.weight_scale"].view(torch.uint8), before[f"{linear}.weight_scale"].view(torch.uint8)
        )
        found, expected = converted.weight(linear, CPU), original.weight(linear, CPU)
        # the reciprocal is taken twice in float32
        assert ((found - expected).abs() <= 2 * torch.finfo(torch.float32).eps * expected.abs()).all()
    assert not any(name.endswith(("input_scale", "scale_2")) for name in after)


def test_modelopt_with_experts(tmp_path):
    """ModelOpt exports one matrix per expert. Routers are in 16 bits, and refused where packed."""
    make_family("Qwen3MoeForCausalLM", tmp_path / "s", mlp_only_layers=[])
    quantize_checkpoint(tmp_path / "s", tmp_path / "q", progress=False)
    linears = list(linear_shapes(tmp_path / "q"))
    plain = [linear for linear in linears if linear.startswith("model.layers.1.mlp.experts.")]
    source = modelopt(tmp_path / "q", tmp_path / "m", plain, linears=linears)
    assert check_checkpoint(source) == "modelopt"
    convert_checkpoint(source, tmp_path / "n", progress=False)
    routers = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert read_ignore(tmp_path / "n") == ["lm_head", *routers, *plain]
    validate_nvfp4_checkpoint(tmp_path / "n")
    original, converted = Base(tmp_path / "q"), Base(tmp_path / "n")
    for linear in linears:
        expected = original.weight(linear, CPU)
        if linear in plain:
            assert torch.equal(read_tensor(converted.tensors[f"{linear}.weight"]), expected.bfloat16())
        else:
            torch.testing.assert_close(converted.weight(linear, CPU), expected, rtol=1e-6, atol=0)

    def pack_router(tensors):
        tensors[f"{routers[0]}.weight"] = torch.zeros(4, 64, dtype=torch.uint8)
        tensors[f"{routers[0]}.weight_scale"] = torch.zeros(4, 8).to(torch.float8_e4m3fn)

    for name, others, change, said in (
        ("router", (), pack_router, f"{routers[0]}.weight_scale.*stays in 16 bits"),
        ("mixed", plain[:3], lambda tensors: None, "the 12 linears model.layers.1.mlp.experts.0.gate_proj to"),
    ):
        broken = modelopt(tmp_path / "q", tmp_path / name, others, change=change, linears=linears)
        with pytest.raises(CheckpointError, match=said):
            check_checkpoint(broken)


@pytest.mark.parametrize("name", ["Phi3ForCausalLM", "Gemma3ForCausalLM"])
def test_modelopt_of_other_families(tmp_path, name):
    """The checkpoint fuses linears; embeddings are tied by the model's default and stored twice."""
    make_family(name, tmp_path / "s", **({"tie_word_embeddings": True} if name == "Gemma3ForCausalLM" else {}))
    quantize_checkpoint(tmp_path / "s", tmp_path / "q", progress=False)
    linears = linear_shapes(tmp_path / "q")

    def copy_head(tensors):
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())

    source = modelopt(tmp_path / "q", tmp_path / "m", linears=linears, change=copy_head)
    content = json.loads((source / "config.json").read_text())
    del content["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(content))
    convert_checkpoint(source, tmp_path / "n", progress=False)
    before, after = Base(tmp_path / "q"), Base(tmp_path / "n")
    for linear in linears:
        torch.testing.assert_close(after.weight(linear, CPU), before.weight(linear, CPU), rtol=1e-6, atol=0)


def test_mxfp4_decodes_to_the_same_weights(bf16_checkpoint, tmp_path):
    source, expected = mxfp4(bf16_checkpoint, tmp_path / "m")
    assert check_checkpoint(source) == "mxfp4"
    convert_checkpoint(source, tmp_path / "n", progress=False)
    converted = Base(tmp_path / "n")
    for linear in LINEARS:
        assert torch.equal(converted.weight(linear, CPU), expected[linear]), linear
    scales = [Base(tmp_path / "n").tensors[f"model.layers.0.mlp.{p}_proj.weight_global_scale"] for p in ("gate", "up")]
    assert len({read_tensor(info).item() for info in scales}) == 1


def test_a_wide_span_of_exponents_is_refused_by_name(bf16_checkpoint, tmp_path):
    def widen(tensors):
        tensors["model.layers.1.mlp.down_proj.weight_scale"][0, 0] = 60

    source, _ = mxfp4(bf16_checkpoint, tmp_path / "m", widen)
    with pytest.raises(CheckpointError, match=r"exponents of model.layers.1.mlp.down_proj.weight_scale span \d+"):
        convert_checkpoint(source, tmp_path / "n", progress=False)
    assert not (tmp_path / "n").exists()


def test_a_block_of_zeros_has_no_exponent_of_its_own(bf16_checkpoint, tmp_path):
    def empty(tensors):
        tensors["model.layers.0.mlp.up_proj.weight_packed"][3, :16] = 0x80
        tensors["model.layers.0.mlp.up_proj.weight_scale"][3, 0] = 0

    source, _ = mxfp4(bf16_checkpoint, tmp_path / "m", empty)
    convert_checkpoint(source, tmp_path / "n", progress=False)
    assert not Base(tmp_path / "n").weight("model.layers.0.mlp.up_proj", CPU)[3, :32].any()


def test_a_run_takes_it_by_its_path(nvfp4_checkpoint, tmp_path):
    source = modelopt(nvfp4_checkpoint, tmp_path / "m", settings={"kv_cache_quant_algo": "FP8"})
    first = resolve_checkpoint(source, tmp_path / "cache", progress=False)
    assert first.kind == "converted" and "kv_cache_scheme (FP8)" in first.notes[0]
    assert resolve_checkpoint(source, tmp_path / "cache", progress=False).path == first.path
    assert unused_settings(first.path) == []


def test_linears_in_16_bits_stay_so(nvfp4_checkpoint, tmp_path):
    plain = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    source = modelopt(nvfp4_checkpoint, tmp_path / "m", plain)
    convert_checkpoint(source, tmp_path / "n", progress=False)
    validate_nvfp4_checkpoint(tmp_path / "n")
    assert read_ignore(tmp_path / "n") == ["lm_head", *plain]


def test_the_actors_model_computes_with_both_kinds(nvfp4_checkpoint, dequantized_checkpoint, tmp_path):
    plain = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    convert_checkpoint(modelopt(nvfp4_checkpoint, tmp_path / "m", plain), tmp_path / "n", progress=False)
    expected = AutoModelForCausalLM.from_pretrained(dequantized_checkpoint, dtype=torch.float32)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(expected.config, dtype=torch.float32)
    packed = packed_linear_names(tmp_path / "n")
    assert packed == set(LINEARS) - set(plain)
    swap_linears(model, packed, torch.float32)
    load_tensors(model, tmp_path / "n", torch.float32)
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        found, wanted = model(input_ids=ids).logits, expected(input_ids=ids).logits
    # q, k and v of one layer were rounded to bfloat16
    assert (found - wanted).norm() / wanted.norm() < 4 * torch.finfo(torch.bfloat16).eps


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": {"quant_algo": "FP8"}}, "quant_algo FP8"),
        ({"settings": {"group_size": 32}}, "group_size 32"),
        ({"plain": [LINEARS[0]]}, "some are quantized and some are not"),
        ({"change": drop(f"{LINEARS[3]}.weight_scale_2")}, f"{LINEARS[3]}.weight_scale_2 has to be one float32"),
        ({"change": put(f"{LINEARS[3]}.weight_scale_2", torch.tensor(float("inf")))}, "is inf; it multiplies"),
        ({"change": put(f"{LINEARS[3]}.weight_scale_2", torch.tensor(0.0))}, "is 0; it multiplies"),
        ({"change": drop(f"{LINEARS[5]}.weight_scale")}, "is missing"),
        ({"change": put("lm_head.weight", torch.zeros(4, 4, dtype=torch.uint8))}, "lm_head.weight is quantized"),
        ({"change": put("model.layers.0.mlp.up_proj.pre_quant_scale", torch.ones(4))}, "are none of the model"),
        ({"change": put(f"{LINEARS[1]}.weight", torch.zeros(2, 2, dtype=torch.uint8))}, "has shape"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(nvfp4_checkpoint, tmp_path, options, message):
    source = modelopt(nvfp4_checkpoint, tmp_path / "m", **options)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(source)
    with pytest.raises(CheckpointError, match=message):
        convert_checkpoint(source, tmp_path / "n", progress=False)
    assert not (tmp_path / "n").exists()


def test_quantize_names_what_a_run_does_with_it(nvfp4_checkpoint, tmp_path):
    source = modelopt(nvfp4_checkpoint, tmp_path / "m")
    with pytest.raises(CheckpointError, match="converts ModelOpt's NVFP4"):
        quantize_checkpoint(source, tmp_path / "n", progress=False)


@pytest.mark.parametrize(
    ("ignore", "plain", "message"),
    [
        (["lm_head"], [LINEARS[3]], "is in 16 bits, but ignore in config.json does not name it"),
        (["lm_head", LINEARS[3]], [], "is packed, but ignore in config.json names it"),
        (["re:.*q_proj"], [LINEARS[0], LINEARS[7]], "some are packed and some are not"),
        (["re:.*_proj"], LINEARS, "none of its linears is packed"),
        (["lm_head", "re:.*o_proj"], [LINEARS[3], LINEARS[10]], None),
    ],
)
def test_ignore_of_a_ready_made_checkpoint(nvfp4_checkpoint, tmp_path, ignore, plain, message):
    base = Base(nvfp4_checkpoint)

    def tensors(found):
        for linear in plain:
            for part in ("packed", "scale", "global_scale"):
                del found[f"{linear}.weight_{part}"]
            found[f"{linear}.weight"] = base.weight(linear, CPU).bfloat16()

    folder = rewrite(
        nvfp4_checkpoint, tmp_path / "m", lambda c: c["quantization_config"].update(ignore=ignore), tensors
    )
    if message is None:
        validate_nvfp4_checkpoint(folder)
        return
    with pytest.raises(CheckpointError, match=message):
        validate_nvfp4_checkpoint(folder)


def test_fused_linears_may_have_scales_of_their_own(nvfp4_checkpoint, tmp_path):
    """The actor has a scale for each linear; the rollout multiplies rows by their ratio
    (rollout/scheme.py)."""

    def double(found):
        found["model.layers.1.mlp.up_proj.weight_global_scale"] *= 2

    validate_nvfp4_checkpoint(rewrite(nvfp4_checkpoint, tmp_path / "m", lambda config: None, double))
