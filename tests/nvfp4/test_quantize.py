"""Tests quantization.

The written checkpoint is compared with compressed-tensors: its configuration, its decompressor,
and, through transformers, its loading of the whole model.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from accelerate import init_empty_weights
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4, quantize_nvfp4_four_over_six
from qerl_verl.nvfp4 import checkpoint_files
from qerl_verl.nvfp4.architectures import (
    UnsupportedArchitecture,
    automatic_class,
    get_architecture,
    supported_architectures,
)
from qerl_verl.nvfp4.checkpoint_files import read_config
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import FORMAT
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, swap_linears
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.safetensors_stream import HashedFile
from qerl_verl.nvfp4.validation import check_checkpoint, validate_nvfp4_checkpoint
from qerl_verl.nvfp4.verify import verify_checkpoint
from tests.helpers.checkpoint_folders import edit_config, edit_weights, load, quantized
from tests.helpers.tiny_families import TOWERS

Q0 = "model.layers.0.self_attn.q_proj"
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z"))


def assert_nothing_left(dst):
    assert not dst.exists()
    assert not list(dst.parent.glob(f"{dst.name}.tmp-*"))


# --- what is written ---


DATA_FREE = {
    "rtn": (nvfp4_global_scale, quantize_nvfp4),
    "four-over-six": (lambda amax: nvfp4_global_scale(amax, 256.0), quantize_nvfp4_four_over_six),
}


@pytest.mark.parametrize(
    "architecture, method, tied",
    [(name, "rtn", tied) for name in supported_architectures() for tied in (False, True)]
    + [("LlamaForCausalLM", "four-over-six", False)],
)
def test_tensors(make_checkpoint, tmp_path, architecture, method, tied):
    src, dst = quantized(make_checkpoint, tmp_path, architecture, method=method, tie_word_embeddings=tied)
    make_global_scale, quantize = DATA_FREE[method]
    source, output = load(src), load(dst)
    assert ("lm_head.weight" in source) is not tied
    config = AutoConfig.from_pretrained(src)
    row = get_architecture(config)
    linears = {linear for group in row.all_groups(config) for linear in group}
    source = {row.module_name(name): tensor for name, tensor in source.items()}
    whole = dict(source)
    for linear in linears:
        weight = source.pop(f"{linear}.weight")
        parent, _, name = linear.rpartition(".")
        group = next((group for group in FUSED if name in group), (name,))
        amax = max(whole[f"{parent}.{member}.weight"].abs().max() for member in group)
        global_scale = output.pop(f"{linear}.weight_global_scale")
        assert torch.equal(global_scale, make_global_scale(amax))
        packed, scale = quantize(weight, global_scale)
        assert torch.equal(output.pop(f"{linear}.weight_packed"), packed)
        written_scale = output.pop(f"{linear}.weight_scale")
        assert written_scale.dtype == torch.float8_e4m3fn
        assert torch.equal(written_scale.view(torch.uint8), scale.view(torch.uint8))
    assert output.keys() == source.keys()
    for name, tensor in source.items():
        assert output[name].dtype == torch.bfloat16 and torch.equal(output[name], tensor)
    validate_nvfp4_checkpoint(dst)


@pytest.mark.parametrize("method", DATA_FREE)
def test_decompressed_by_compressed_tensors(make_checkpoint, tmp_path, method):
    _, dst = quantized(make_checkpoint, tmp_path, method=method)
    output = load(dst)
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    packed, scale, global_scale = (output[f"{Q0}.{name}"] for name in names)
    state = dict(zip(names, (packed, scale, global_scale), strict=True))
    weight = NVFP4PackedCompressor.decompress(state, preset_name_to_scheme("NVFP4A16", ["Linear"]))["weight"]
    assert weight.dtype == torch.bfloat16
    ours = dequantize_nvfp4(packed, scale, global_scale)
    # compressed-tensors rounds scale / global_scale to float32 before it multiplies, we round the
    # result alone: at most the last bit differs
    assert (weight.view(torch.int16) - ours.view(torch.int16)).abs().max() <= 1
    assert (weight == ours).float().mean() > 0.99


@pytest.mark.parametrize(
    "architecture, tied", [("Qwen2ForCausalLM", True), ("LlamaForCausalLM", False), *((name, True) for name in TOWERS)]
)
def test_model_loaded_by_transformers(make_checkpoint, tmp_path, architecture, tied):
    """The loaded NVFP4 model has the logits of the 16-bit model with decoded quantized weights."""
    src, dst = quantized(make_checkpoint, tmp_path, architecture, tie_word_embeddings=tied)
    tokens = torch.arange(20).view(2, 10)
    automatic = automatic_class(get_architecture({"architectures": [architecture]}))
    reference = automatic.from_pretrained(src, dtype=torch.bfloat16)
    original = reference(tokens).logits.float()
    output = load(dst)
    for name, module in reference.named_modules():
        if f"{name}.weight_packed" in output:
            parts = (output[f"{name}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale"))
            module.weight.data = dequantize_nvfp4(*parts)
    want = reference(tokens).logits.float()
    loaded = automatic.from_pretrained(dst, dtype=torch.bfloat16)
    got = loaded(tokens).logits.float()
    assert (got - want).norm() < 2 * torch.finfo(torch.bfloat16).eps * want.norm()
    # quantization is visible, so the check above means something
    assert (original - want).norm() > 0.02 * want.norm()


def test_configuration_is_what_compressed_tensors_writes(make_checkpoint, tmp_path):
    src, dst = quantized(make_checkpoint, tmp_path)
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    scheme.format = FORMAT
    reference = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=FORMAT,
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    shutil.copy(src / "config.json", tmp_path / "config.json")
    ModelCompressor(quantization_config=reference).update_config(tmp_path)
    want = json.loads((tmp_path / "config.json").read_text())
    got = json.loads((dst / "config.json").read_text())
    assert got == want
    assert got["dtype"] == "bfloat16"


def test_other_files_are_copied_and_weights_are_not(make_checkpoint, tmp_path):
    src = make_checkpoint()
    (src / "original").mkdir()
    (src / "original" / "params.json").write_text("{}")
    (src / "original" / "consolidated.00.pth").write_bytes(b"weights")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.gguf", "training_args.bin"):
        (src / name).write_bytes(b"weights")
    (src / ".cache").mkdir()
    (src / ".cache" / "lock").write_text("")
    records = quantize_checkpoint(src, tmp_path / "dst", progress=False)
    copied = {"chat_template.jinja", "generation_config.json", "original/params.json", "tokenizer.json"}
    files = {p.relative_to(tmp_path / "dst").as_posix() for p in (tmp_path / "dst").rglob("*") if p.is_file()}
    assert files == copied | {"config.json", "model.safetensors", "qerl_manifest.json", "qerl_report.json"}
    for name in copied:
        assert (tmp_path / "dst" / name).read_bytes() == (src / name).read_bytes()
    manifest = json.loads((tmp_path / "dst" / "qerl_manifest.json").read_text())
    assert records.keys() == manifest["files"].keys() == files - {"qerl_manifest.json"}
    for name, record in records.items():
        data = (tmp_path / "dst" / name).read_bytes()
        assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert manifest["files"][name] == {"size": record.size, "sha256": record.sha256}


def test_shards_in_and_out(make_checkpoint, tmp_path):
    """Source and output may be cut anywhere, even where a fused group spans files."""
    single, shards = make_checkpoint(name="single"), make_checkpoint(name="shards", shards=True)
    weight_map = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({weight_map[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv"}) > 1
    quantize_checkpoint(single, tmp_path / "a", progress=False)
    quantize_checkpoint(shards, tmp_path / "b", progress=False, max_shard_bytes=30_000)
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) for n in a)

    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in b.values())
    assert index["weight_map"].keys() == b.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "b" / file, "pt") as opened:
            assert name in opened.keys()
            assert opened.metadata() == {"format": "pt"}
    assert all(sum(t.nbytes for t in load_file(tmp_path / "b" / f).values()) <= 30_000 for f in files)
    validate_nvfp4_checkpoint(tmp_path / "b")


def test_float32_source(make_checkpoint, tmp_path):
    """Linears are quantized from float32; everything else becomes bfloat16, as the config says."""
    src, dst = quantized(make_checkpoint, tmp_path, dtype=torch.float32)
    edit_config(src, dtype="float32")
    source, output = load(src), load(dst)
    down = "model.layers.1.mlp.down_proj"
    weight = source[f"{down}.weight"]
    packed, _ = quantize_nvfp4(weight, output[f"{down}.weight_global_scale"])
    rounded, _ = quantize_nvfp4(weight.bfloat16(), output[f"{down}.weight_global_scale"])
    assert torch.equal(output[f"{down}.weight_packed"], packed) and not torch.equal(packed, rounded)
    for name in ("model.norm.weight", "model.embed_tokens.weight", f"{Q0}.bias"):
        assert source[name].dtype == torch.float32
        assert torch.equal(output[name], source[name].bfloat16())
    assert json.loads((dst / "config.json").read_text())["dtype"] == "bfloat16"


def test_float16_source_stays_float16(make_checkpoint, tmp_path):
    src, dst = quantized(make_checkpoint, tmp_path, dtype=torch.float16)
    source, output = load(src), load(dst)
    assert torch.equal(output["lm_head.weight"], source["lm_head.weight"])
    assert output["model.norm.weight"].dtype == torch.float16
    assert json.loads((dst / "config.json").read_text())["dtype"] == "float16"


def test_all_zero_weights(make_checkpoint, tmp_path):
    src = make_checkpoint()
    edit_weights(src, lambda t: t[f"{Q0[:-6]}o_proj.weight"].zero_())
    quantize_checkpoint(src, tmp_path / "dst", progress=False)
    output = load(tmp_path / "dst")
    assert output[f"{Q0[:-6]}o_proj.weight_packed"].eq(0).all()
    assert output[f"{Q0[:-6]}o_proj.weight_global_scale"].item() == 1.0


INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
KV_SCALE = "model.layers.0.self_attn.k_scale"


@pytest.mark.parametrize("name", [INV_FREQ, "model.rotary_emb.inv_freq", KV_SCALE])
def test_what_no_engine_computes_with_is_left_out(make_checkpoint, tmp_path, name):
    src = make_checkpoint()
    edit_weights(src, lambda t: t.__setitem__(name, torch.rand(8)))
    quantize_checkpoint(src, tmp_path / "dst", progress=False)
    assert name not in load(tmp_path / "dst")
    validate_nvfp4_checkpoint(tmp_path / "dst")


def test_torch_threads_are_given_back(make_checkpoint, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        quantized(make_checkpoint, tmp_path)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_memory_is_that_of_a_layer(tmp_path):
    """Measures the peak memory of a quantizing process above that of one that has only imported.

    The model has 2 layers and an embedding that is larger than one of them. The process has one
    thread, since every further thread has an allocator's arena of its own.
    """
    src = tmp_path / "src"
    src.mkdir()
    hidden, inner, layers, vocabulary = 2048, 4096, 2, 24576
    config = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers)
    config |= dict(num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, dtype="bfloat16")
    config |= dict(architectures=["LlamaForCausalLM"], model_type="llama")
    (src / "config.json").write_text(json.dumps(config))
    shapes = get_architecture(config).tensor_shapes(LlamaConfig(**config))
    save_file({n: torch.full(s, 0.02, dtype=torch.bfloat16) for n, s in shapes.items()}, src / "model.safetensors")
    layer_bytes = 2 * (4 * hidden * hidden + 3 * hidden * inner)
    assert (src / "model.safetensors").stat().st_size > 3 * layer_bytes

    script = """if True:
        import re, sys
        from pathlib import Path
        import torch
        from qerl_verl.nvfp4.checkpoint_files import load_hf_config
        from qerl_verl.nvfp4.quantize import quantize_checkpoint
        src, dst = map(Path, sys.argv[1:])
        load_hf_config(src)  # imports transformers
        torch.set_num_threads(1)
        def kibibytes(key):  # not getrusage: its peak is inherited from the parent process
            return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
        before = kibibytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        quantize_checkpoint(src, dst, progress=False)
        print(kibibytes("VmHWM") - before)
    """
    arguments = [sys.executable, "-c", script, src, tmp_path / "dst"]
    out = subprocess.run(arguments, capture_output=True, text=True, check=True)
    peak = int(out.stdout) * 1024 / layer_bytes
    print(f"peak memory: {peak:.2f} layers")
    assert 0.5 < peak < 1.5  # a fused group must be in memory; the whole model would be 3
    validate_nvfp4_checkpoint(tmp_path / "dst")


# --- experts ---


MOE = "Qwen3MoeForCausalLM"
EXPERT = "model.layers.0.mlp.experts.2"
ROUTER = "model.layers.0.mlp.gate"


def stack_experts(folder):
    """Rewrites the checkpoint as ``save_pretrained(save_original_format=False)`` does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, save_original_format=False)


def test_both_layouts_of_experts_give_the_same_bytes(make_checkpoint, tmp_path):
    src, stacked = make_checkpoint(MOE), make_checkpoint(MOE, name="stacked")
    stack_experts(stacked)
    assert load(stacked)["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 96, 128)
    assert f"{EXPERT}.gate_proj.weight" in load(src) and f"{EXPERT}.gate_proj.weight" not in load(stacked)
    for folder in (src, stacked):
        assert check_checkpoint(folder) == "none"
        quantize_checkpoint(folder, tmp_path / f"{folder.name}-q", progress=False)
    one, other = load(tmp_path / "src-q"), load(tmp_path / "stacked-q")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n].view(torch.uint8), other[n].view(torch.uint8)) for n in one)
    assert verify_checkpoint(tmp_path / "stacked-q", progress=False)["linears"] == 2 * 4 + 4 * 3 + 3


def test_a_stack_of_another_shape(make_checkpoint, tmp_path):
    src = make_checkpoint(MOE)
    stack_experts(src)
    edit_config(src, moe_intermediate_size=64)
    refused(src, tmp_path, "model.layers.0.mlp.experts.down_proj", "[4, 128, 48]", "[4, 128, 64]")


def test_routers_stay_in_16_bits_and_are_named(make_checkpoint, tmp_path):
    """Names agree with compressed-tensors and vLLM; in the report, experts form one kind each."""
    src, dst = quantized(make_checkpoint, tmp_path, MOE)
    assert read_config(dst)["quantization_config"]["ignore"] == ["lm_head", ROUTER]
    assert torch.equal(load(dst)[f"{ROUTER}.weight"], load(src)[f"{ROUTER}.weight"])
    kinds = json.loads((dst / "qerl_report.json").read_text())["kinds"]
    assert {k for k in kinds if "experts" in k} == {f"mlp.experts.*.{n}_proj" for n in ("gate", "up", "down")}
    assert "mlp.gate_proj" in kinds


def test_an_experts_bytes_are_compressed_tensors(make_checkpoint, tmp_path):
    """Compares with its own compressor, with the global scale that an expert's gate and up
    share."""
    src, dst = quantized(make_checkpoint, tmp_path, MOE)
    source, output = load(src), load(dst)
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    amax = max(source[f"{EXPERT}.{n}.weight"].float().abs().max() for n in ("gate_proj", "up_proj"))
    for name in ("gate_proj", "up_proj"):
        weight = source[f"{EXPERT}.{name}.weight"]
        global_scale = generate_gparam(-amax.reshape(1), amax.reshape(1))
        blocks = weight.unflatten(1, (-1, 16))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=global_scale)
        state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
        # their compiled code rounds differently from their eager code
        with torch.compiler.set_stance("force_eager"):
            expected = NVFP4PackedCompressor.compress(state, scheme)
        for part in ("weight_packed", "weight_scale", "weight_global_scale"):
            found = output[f"{EXPERT}.{name}.{part}"]
            assert torch.equal(found.view(torch.uint8), expected[part].to(found.dtype).view(torch.uint8)), part


# --- what is refused ---


def refused(src, tmp_path, *named, error=CheckpointError):
    with pytest.raises(error) as caught:
        quantize_checkpoint(src, tmp_path / "dst", progress=False)
    for text in named:
        assert text in str(caught.value)
    assert_nothing_left(tmp_path / "dst")


@pytest.mark.parametrize("name", [f"{Q0}.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_or_inf(make_checkpoint, tmp_path, name, value):
    src = make_checkpoint()
    edit_weights(src, lambda t: t[name].view(-1)[7:8].fill_(value))
    refused(src, tmp_path, name, "NaN or Inf", "model.safetensors")


def test_input_channels_not_divisible(make_checkpoint, tmp_path):
    src = make_checkpoint(intermediate_size=100)
    refused(src, tmp_path, "down_proj.weight", "100 input channels", "multiple of 16")


def test_missing_tensor(make_checkpoint, tmp_path):
    src = make_checkpoint()
    edit_weights(src, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(src, tmp_path, "model.layers.1.mlp.up_proj.weight", "missing")


EXTRA = [
    (
        "v_head.summary.weight",
        "1 of 28 tensors are none of the model that config.json describes: v_head.summary.weight",
    ),
    ("score.weight", "score.weight"),
    # config.json has two layers
    ("model.layers.2.self_attn.q_proj.weight", "model.layers.2.self_attn.q_proj.weight"),
    ("model.layers.0.self_attn.q_norm.weight", "q_norm.weight"),
    ("model.layers.0.self_attn.o_proj.bias", "o_proj.bias"),
    ("base_model.model.model.norm.weight", "base_model.model.model.norm.weight"),
]
"""Tensors that the model does not have, and what the message says."""


@pytest.mark.parametrize("name, named", EXTRA)
def test_a_tensor_that_the_model_does_not_have(make_checkpoint, tmp_path, name, named):
    src, dst = quantized(make_checkpoint, tmp_path)
    for folder in (src, dst):
        edit_weights(folder, lambda t: t.__setitem__(name, torch.zeros(1, 64).bfloat16()))
    refused(src, tmp_path / "second", named, str(src))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        validate_nvfp4_checkpoint(dst)


def test_an_output_layer_that_is_not_the_embeddings_it_should_be_tied_to(make_checkpoint, tmp_path):
    src = make_checkpoint(tie_word_embeddings=True)
    copy = lambda t: t.__setitem__("lm_head.weight", t["model.embed_tokens.weight"].clone())  # noqa: E731
    edit_weights(src, copy)
    quantize_checkpoint(src, tmp_path / "same", progress=False)
    for folder in (src, tmp_path / "same"):
        edit_weights(folder, lambda t: t["lm_head.weight"][3, 5].add_(1))
        with pytest.raises(CheckpointError, match="lm_head.weight differs from .* tie_word_embeddings: true"):
            check_checkpoint(folder)


def test_wrong_shape(make_checkpoint, tmp_path):
    src = make_checkpoint()
    edit_weights(src, lambda t: t.__setitem__(f"{Q0}.bias", torch.zeros(63, dtype=torch.bfloat16)))
    refused(src, tmp_path, f"{Q0}.bias", "[63]", "[128]")


def test_unexpected_dtype(make_checkpoint, tmp_path):
    src = make_checkpoint()
    edit_weights(src, lambda t: t.__setitem__(f"{Q0}.weight", t[f"{Q0}.weight"].to(torch.float8_e4m3fn)))
    refused(src, tmp_path, f"{Q0}.weight", "F8_E4M3", "BF16")


def test_missing_shard(make_checkpoint, tmp_path):
    src = make_checkpoint(shards=True)
    shard = sorted(src.glob("*.safetensors"))[1]
    shard.unlink()
    refused(src, tmp_path, shard.name, "missing", "index.json")


def test_two_sets_of_weights(make_checkpoint, tmp_path):
    src = make_checkpoint(shards=True)
    shutil.copy(next(src.glob("*.safetensors")), src / "model.safetensors")
    refused(src, tmp_path, "two models, model.safetensors and what model.safetensors.index.json lists")


def test_tensor_missing_from_its_shard(make_checkpoint, tmp_path):
    src = make_checkpoint(shards=True)
    shard = next(f for f in src.glob("*.safetensors") if len(load_file(f)) > 1)
    tensors = load_file(shard)
    name, _ = tensors.popitem()
    save_file(tensors, shard)
    refused(src, tmp_path, name, shard.name, "missing")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_file(make_checkpoint, tmp_path, keep):
    src = make_checkpoint()
    data = (src / "model.safetensors").read_bytes()
    (src / "model.safetensors").write_bytes(data[:keep])
    refused(src, tmp_path, "model.safetensors", "fetch it again")


@pytest.mark.parametrize("data", [b"version https://git-lfs.github.com/spec/v1\n", b"\x04\0\0\0\0\0\0\0null"])
def test_not_safetensors(make_checkpoint, tmp_path, data):
    src = make_checkpoint()
    (src / "model.safetensors").write_bytes(data)
    refused(src, tmp_path, "model.safetensors", "fetch it again")


def test_pickles_only(make_checkpoint, tmp_path):
    src = make_checkpoint()
    (src / "model.safetensors").rename(src / "pytorch_model.bin")
    refused(src, tmp_path, ".bin", "save_pretrained")
    (src / "pytorch_model.bin").unlink()
    refused(src, tmp_path, "holds no weights")


def test_no_model_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "nowhere", "not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "config.json", "no such file")
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "empty", tmp_path, "holds a PEFT adapter but no model", "lora_adapter_path")
    (tmp_path / "empty" / "config.json").write_text("{")
    refused(tmp_path / "empty", tmp_path, "config.json", "not valid JSON")


def test_a_family_that_is_not_in_the_table(make_checkpoint, tmp_path):
    src = make_checkpoint()
    edit_config(src, architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3")
    refused(src, tmp_path, "DeepseekV3ForCausalLM", "LlamaForCausalLM", error=UnsupportedArchitecture)


def test_quantized_already(make_checkpoint, tmp_path):
    _, dst = quantized(make_checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match="already an NVFP4 checkpoint"):
        quantize_checkpoint(dst, tmp_path / "again", progress=False)
    assert_nothing_left(tmp_path / "again")


def test_destination_in_use(make_checkpoint, tmp_path):
    src = make_checkpoint()
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "mine").write_text("keep me")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        quantize_checkpoint(src, tmp_path / "dst", progress=False)
    assert (tmp_path / "dst" / "mine").read_text() == "keep me"
    (tmp_path / "dst" / "mine").unlink()
    quantize_checkpoint(src, tmp_path / "dst", progress=False)  # an empty folder is accepted
    validate_nvfp4_checkpoint(tmp_path / "dst")


def test_disk_too_small(make_checkpoint, tmp_path, monkeypatch):
    src, want = quantized(make_checkpoint, tmp_path)
    shutil.move(want, tmp_path / "want")
    total = sum(f.stat().st_size for f in (tmp_path / "want").iterdir())
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk_usage(path):
        asked.append(path)
        return usage(10**9, 0, total // 2)

    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", disk_usage)
    refused(src, tmp_path, "dst", "free", "GB")
    assert asked == [tmp_path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_in_the_middle(make_checkpoint, tmp_path, monkeypatch, code):
    write, count = HashedFile.write, []

    def full(self, data):
        count.append(len(data))
        if sum(count) > 50_000:
            raise OSError(code, os.strerror(code))
        write(self, data)

    monkeypatch.setattr(HashedFile, "write", full)
    refused(make_checkpoint(), tmp_path, "was full", "dst")
    assert sum(count) > 50_000


def test_really_full_disk(make_checkpoint, tmp_path, monkeypatch):
    """The file system has 64 KiB, and the check of free space is misled."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], stderr=-3).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        monkeypatch.setattr("qerl_verl.nvfp4.quantize.check_space", lambda dst, needed: None)
        with pytest.raises(CheckpointError, match="was full"):
            quantize_checkpoint(make_checkpoint(), disk / "dst", progress=False)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


# --- delta nets ---

HYBRID = "Qwen3_5ForCausalLM"
NET = "model.layers.0.linear_attn"


def test_what_of_a_delta_net_is_packed(make_checkpoint, tmp_path):
    """Decay and bias of the time step keep float32; the other tensors are in 16 bits."""
    src = make_checkpoint(HYBRID)

    def as_published(tensors):
        for name in ("A_log", "dt_bias", "norm.weight"):
            tensors[f"{NET}.{name}"] = tensors[f"{NET}.{name}"].float() + 1e-5
        tensors["mtp.fc.weight"] = torch.zeros(128, 256, dtype=torch.bfloat16)  # of a head that predicts further tokens

    edit_weights(src, as_published)
    quantize_checkpoint(src, tmp_path / "q", progress=False)
    source, output = load(src), load(tmp_path / "q")
    packed = {name.removesuffix(".weight_packed") for name in output if name.endswith("_packed")}
    assert {name for name in packed if name.startswith(NET)} == {
        f"{NET}.{linear}" for linear in ("in_proj_qkv", "in_proj_z", "out_proj")
    }
    assert output["model.layers.1.self_attn.q_proj.weight_packed"].shape == (2 * 4 * 64, 64)  # heads and their gates
    for name in ("A_log", "dt_bias"):
        assert output[f"{NET}.{name}"].dtype == torch.float32
        assert torch.equal(output[f"{NET}.{name}"], source[f"{NET}.{name}"])
    for name in ("in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "norm.weight"):
        assert torch.equal(output[f"{NET}.{name}"], source[f"{NET}.{name}"].bfloat16())
    assert not any(name.startswith("mtp.") for name in output)
    ignore = read_config(tmp_path / "q")["quantization_config"]["ignore"]
    assert ignore == ["lm_head", r"re:.*\.linear_attn\.(?:in_proj_b|in_proj_a)$"]
    assert check_checkpoint(tmp_path / "q") == "nvfp4"
    assert verify_checkpoint(tmp_path / "q", progress=False)["linears"] == 3 + 4 + 2 * 3


def test_the_actor_holds_a_delta_nets_decay_in_float32(make_checkpoint, tmp_path):
    """vLLM does too, and FSDP2 casts no buffers."""
    src = make_checkpoint(HYBRID)
    edit_weights(src, lambda tensors: tensors.update({f"{NET}.A_log": tensors[f"{NET}.A_log"].float() + 1e-5}))
    quantize_checkpoint(src, tmp_path / "q", progress=False)
    config = AutoConfig.from_pretrained(tmp_path / "q")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    swap_linears(model, packed_linear_names(tmp_path / "q"), torch.bfloat16)
    load_tensors(model, tmp_path / "q", torch.bfloat16)
    decay = dict(model.named_buffers())[f"{NET}.A_log"]
    assert decay.dtype == torch.float32 and torch.equal(decay, load(src)[f"{NET}.A_log"])
    assert model.get_parameter(f"{NET}.dt_bias").dtype == torch.bfloat16 and f"{NET}.A_log" in model.state_dict()
