"""Tests that ``qerl quantize --check`` names what is wrong in the bytes of an NVFP4 folder."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.verify import verify_checkpoint

O1 = "model.layers.1.self_attn.o_proj"


@pytest.fixture
def folder(make_checkpoint, tmp_path):
    quantize_checkpoint(make_checkpoint(), tmp_path / "dst", progress=False)
    return tmp_path / "dst"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def scale_byte(value):
    return lambda t: t[f"{O1}.weight_scale"].view(torch.uint8)[3, 1:2].fill_(value)


def zero_scale_under_zero_codes(tensors):
    tensors[f"{O1}.weight_packed"][3, 8:16] = 0x80  # zeros of both signs
    scale_byte(0)(tensors)


def flip_the_last_byte(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def test_whole(folder):
    found = verify_checkpoint(folder, progress=False)
    weights = sum(2 * t.numel() for n, t in load_file(folder / "model.safetensors").items() if n.endswith("_packed"))
    others = len(load_file(folder / "model.safetensors")) - 3 * 14
    assert found == {"linears": 14, "weights": weights, "other tensors": others, "files": 6}


def test_without_a_manifest(folder):
    (folder / "qerl_manifest.json").unlink()
    edit(folder, zero_scale_under_zero_codes)  # no weight is lost
    assert verify_checkpoint(folder, progress=False)["files"] == 0


@pytest.mark.parametrize(
    "change, named",
    [
        (scale_byte(0), f"{O1} has 1 blocks of 16 whose scale is zero"),
        (scale_byte(0x7F), f"{O1}.weight_scale holds 1 NaN"),
        (scale_byte(0xFF), f"{O1}.weight_scale holds 1 NaN"),
        (scale_byte(0xB0), "1 negative"),
        (lambda t: t[f"{O1}.weight_global_scale"].fill_(0), f"{O1}.weight_global_scale is 0"),
        (lambda t: t[f"{O1}.weight_global_scale"].fill_(float("inf")), f"{O1}.weight_global_scale is inf"),
        (lambda t: t[f"{O1}.weight_global_scale"].fill_(2.0**-126), f"{O1} decodes to NaN or Inf"),
        (lambda t: t["model.embed_tokens.weight"][5, 5:6].fill_(float("nan")), "model.embed_tokens.weight holds NaN"),
        (lambda t: t.pop(f"{O1}.weight_packed"), f"{O1}.weight_packed is missing"),
    ],
)
def test_what_is_wrong_is_named(folder, change, named):
    edit(folder, change)
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(folder, progress=False)
    assert named in str(error.value)


@pytest.mark.parametrize(
    "change, named",
    [
        (flip_the_last_byte, "model.safetensors: its content is not what"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "is 2 bytes long"),
        (lambda f: (f / "tokenizer.json").write_text('{"made": "UP"}'), "its content is not what"),
        (lambda f: (f / "qerl_manifest.json").write_text("{}"), "qerl_manifest.json is damaged"),
    ],
)
def test_files_that_are_not_as_written(folder, change, named):
    change(folder)
    with pytest.raises(CheckpointError, match=named):
        verify_checkpoint(folder, progress=False)


def test_an_original_is_no_nvfp4_folder(make_checkpoint):
    with pytest.raises(CheckpointError, match="is not quantized"):
        verify_checkpoint(make_checkpoint(), progress=False)


def test_the_report_of_the_folder(folder):
    report = json.loads((folder / "qerl_report.json").read_text())
    assert report["method"] == "four-over-six" and report["calibration"] is report["text"] is None
    assert len(report["linears"]) == 14 and len(report["kinds"]) == 7
    errors = {name: values["weight_error"] for name, values in report["linears"].items()}
    assert report["worst"] == sorted(errors, key=errors.get, reverse=True)[:5]
    assert all(18 < values["weight_snr_db"] < 24 for values in report["kinds"].values())
