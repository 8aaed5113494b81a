"""Tests models with a vision tower in verl's FSDP2 engine, on sequences with images."""

import pytest
import torch
from transformers import AutoConfig

from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.quickstart.tiny_model import build_tokenizer
from tests.helpers.tiny_families import TOWERS, Reference, make_family
from tests.helpers.tiny_vision import image_sequences

PACKED = {"use_remove_padding": True, "packed_attention": True}
VARIANTS = {"padded": {}, "packed": PACKED, "chunks": PACKED | {"use_fused_kernels": True}}
IMAGE_TOKENS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
QUICK = ("Qwen3VLForConditionalGeneration",)


SINGLE = {"mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32"}, "lr_warmup_steps": 0}


def make_source(name, folder):
    """Makes a 16-bit checkpoint with a tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(make_family(name, folder, vocab_size=len(tokenizer), **IMAGE_TOKENS))
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in TOWERS]
)
def test_sequences_with_images_train_the_same_however_they_are_laid_out(run_engine, tmp_path, name):
    """Log-probabilities without the adapter are transformers' own, in float64, on the decoded
    weights. The loss and the gradient norm of two steps are those of padded rows. Only the decoder
    has an adapter.
    """
    quantize_checkpoint(make_source(name, tmp_path / "source"), tmp_path / "model", progress=False)
    variants = {key: value | {"images": True, "reference": True} for key, value in VARIANTS.items()}
    (report,) = run_engine(tmp_path / "model", tmp_path / "r", variants=variants, **SINGLE)

    config = AutoConfig.from_pretrained(tmp_path / "model")
    sequences, reference = image_sequences(config), Reference(tmp_path / "model")
    prompts = [sequence.ids.tolist() for sequence in sequences]
    inputs = [
        {"pixel_values": s.pixel_values, "image_grid_thw": s.grid, "mm_token_type_ids": s.types(config)}
        for s in sequences
    ]
    padded = report["padded"]
    assert padded["loss"][0] != padded["loss"][1] and min(padded["grad_norm"]) > 0
    for seen in report.values():
        found = torch.tensor(seen["without"]).split([len(prompt) for prompt in prompts])
        reference.check(prompts, [values[:-1] for values in found], inputs)
        assert seen["loss"] == pytest.approx(padded["loss"], rel=1e-4, abs=1e-5)
        assert seen["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-3)
    adapter = torch.load(f"{tmp_path / 'r'}.padded.pt")
    assert len(adapter) == 2 * 2 * 7 and all("language_model.layers." in tensor for tensor in adapter)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_two_ranks_train_as_one_does(run_engine, tmp_path, name):
    """The tower is sharded like other frozen 16-bit weights, and rank 1 gets it from rank 0. With
    Ulysses each rank has a part of every sequence.
    """
    quantize_checkpoint(make_source(name, tmp_path / "source"), tmp_path / "model", progress=False)
    packed = PACKED | {"images": True}
    # of Qwen2.5-VL, verl hands flash-attn the attention of divided sequences
    divided = {} if name == "Qwen2_5_VLForConditionalGeneration" else {"divided": packed | {"ulysses": 2}}
    (one,) = run_engine(tmp_path / "model", tmp_path / "one", variants={"packed": packed}, **SINGLE)
    variants = {"packed": packed, **divided}
    first, second = run_engine(tmp_path / "model", tmp_path / "two", world=2, variants=variants, **SINGLE)
    for variant in variants:
        assert first[variant]["adapter"] == second[variant]["adapter"]
        assert first[variant]["loss"] == pytest.approx(one["packed"]["loss"], rel=1e-4, abs=1e-5)
        assert first[variant]["grad_norm"] == pytest.approx(one["packed"]["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_the_arm_of_16_bits_trains_on_images(run_engine, tmp_path, name):
    """The arm uses verl's own engine, with the adapter on the decoder only."""
    make_source(name, tmp_path / "source")
    packed = {} if name == "Qwen2_5_VLForConditionalGeneration" else PACKED
    variants = {"bf16": {"arm": "bf16", "images": True, **packed}}
    (report,) = run_engine(tmp_path / "source", tmp_path / "r", variants=variants, lr_warmup_steps=0)
    assert report["bf16"]["class"] == "BF16EngineWithLMHead"
    assert report["bf16"]["loss"][0] != report["bf16"]["loss"][1] and min(report["bf16"]["grad_norm"]) > 0
    adapter = torch.load(f"{tmp_path / 'r'}.bf16.pt")
    assert len(adapter) == 2 * 2 * 7 and all("language_model.layers." in tensor for tensor in adapter)
