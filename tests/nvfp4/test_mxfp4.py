"""Tests MXFP4 values in the container of NVFP4, and that what does not fit is refused by name."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from qerl_verl.config import replace_models
from qerl_verl.config.quantization import choose_quantization
from qerl_verl.config.settings import QeRLSettings, SettingsError
from qerl_verl.kernels.mxfp4_quantize import mxfp4_exponents, mxfp4_global_scale, quantize_mxfp4
from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.manifest import MANIFEST_FILE
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.validation import check_method, validate_nvfp4_checkpoint
from qerl_verl.nvfp4.verify import verify_checkpoint


@pytest.fixture(scope="module")
def mxfp4_checkpoint(tmp_path_factory, bf16_checkpoint):
    folder = tmp_path_factory.mktemp("mxfp4") / "model"
    quantize_checkpoint(bf16_checkpoint, folder, method="mxfp4", progress=False)
    return folder


def test_the_container_is_nvfp4s_and_the_values_are_mxfp4s(mxfp4_checkpoint, bf16_checkpoint):
    validate_nvfp4_checkpoint(mxfp4_checkpoint)
    verify_checkpoint(mxfp4_checkpoint, progress=False)
    packed, original = (
        load_file(mxfp4_checkpoint / "model.safetensors"),
        load_file(bf16_checkpoint / "model.safetensors"),
    )
    linears = [name.removesuffix(".weight_packed") for name in packed if name.endswith(".weight_packed")]
    assert len(linears) == 2 * 7
    for linear in linears:
        weight = original[f"{linear}.weight"]
        parts = [packed[f"{linear}.weight_{part}"] for part in ("packed", "scale", "global_scale")]
        # fused linears share a divisor, which changes no value
        alone = mxfp4_global_scale(weight.abs().max())
        expected = dequantize_nvfp4(*quantize_mxfp4(weight, alone), alone, torch.float32)
        assert torch.equal(dequantize_nvfp4(*parts, torch.float32), expected)
    assert json.loads((mxfp4_checkpoint / MANIFEST_FILE).read_text())["method"] == "mxfp4"


def test_fused_linears_share_a_power_of_two(mxfp4_checkpoint):
    packed = load_file(mxfp4_checkpoint / "model.safetensors")
    scales = {packed[f"model.layers.0.self_attn.{n}_proj.weight_global_scale"].item() for n in "qkv"}
    assert len(scales) == 1 and torch.frexp(torch.tensor(scales.pop())).mantissa == 0.5


def changed(source, folder, name, change):
    """Returns a copy of a checkpoint with one tensor changed in place."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_exponents_that_span_too_much_are_refused_by_the_tensors_name(tmp_path, bf16_checkpoint):
    name = "model.layers.1.self_attn.k_proj.weight"
    low = mxfp4_exponents(load_file(bf16_checkpoint / "model.safetensors")[name]).min().item() - 40
    source = changed(bf16_checkpoint, tmp_path / "a", name, lambda w: w[3, 32:64].mul_(2.0**-40))
    with pytest.raises(
        CheckpointError, match=f"{name}: the shared exponents .* down to -[0-9]+, .*a span of [0-9]+, .*17"
    ):
        quantize_checkpoint(source, tmp_path / "out", method="mxfp4", progress=False)
    assert not (tmp_path / "out").exists() and low < -40
    # a block without an exponent
    zeros = changed(bf16_checkpoint, tmp_path / "b", name, lambda w: w[3, 32:64].zero_())
    quantize_checkpoint(zeros, tmp_path / "out", method="mxfp4", progress=False)


def test_input_channels_that_32_does_not_divide_are_refused(tmp_path, model_factory):
    source = model_factory(tmp_path / "odd", hidden_size=112, num_attention_heads=7, num_key_value_heads=1)
    with pytest.raises(CheckpointError, match="gate_proj.weight has 112 input channels. MXFP4 needs a multiple of 32"):
        quantize_checkpoint(source, tmp_path / "out", method="mxfp4", progress=False)


def resolve(path, arm, cache):
    settings = QeRLSettings(arm, cache_dir=str(cache))
    return replace_models.resolve(
        "model.path", str(path), settings, choose_quantization(OmegaConf.create(), settings, gpu=False)
    )


def test_the_cache_keeps_the_forms_of_one_model_apart(tmp_path, bf16_checkpoint):
    folders = {arm: resolve(bf16_checkpoint, arm, tmp_path) for arm in ("nvfp4", "mxfp4")}
    methods = {arm: json.loads((folder / MANIFEST_FILE).read_text())["method"] for arm, folder in folders.items()}
    assert folders["nvfp4"] != folders["mxfp4"] and methods["mxfp4"] == "mxfp4" != methods["nvfp4"]


def test_a_ready_made_checkpoint_of_the_other_form_is_refused(tmp_path, nvfp4_checkpoint, mxfp4_checkpoint):
    for arm, folder, form in (("nvfp4", mxfp4_checkpoint, "MXFP4"), ("mxfp4", nvfp4_checkpoint, "NVFP4")):
        with pytest.raises(SettingsError, match=f"is packed as {form}: use .qerl={form.lower()}"):
            resolve(folder, arm, tmp_path)


def test_mxfp4_that_was_converted_from_another_librarys_serves_either_arm(tmp_path):
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"method": "converted from mxfp4"}))
    for arm in ("nvfp4", "mxfp4"):
        check_method(tmp_path, arm)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"method": "converted from modelopt"}))
    with pytest.raises(CheckpointError, match="use .qerl=nvfp4"):
        check_method(tmp_path, "mxfp4")
