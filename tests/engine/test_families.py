"""Tests a training step of every family in verl's FSDP2 engine, for each layout of sequences."""

import pytest

from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.quickstart.tiny_model import build_tokenizer
from tests.helpers.tiny_families import FAMILIES, TOWERS, make_family

PACKED = {"use_remove_padding": True, "packed_attention": True}
VARIANTS = {"padded": {}, "packed": PACKED, "chunks": PACKED | {"use_fused_kernels": True}}
"""Padded rows with SDPA; one packed row with the package's attention; the same with
log-probabilities from the output layer."""
PADDED = {"padded": {}, "chunks": {"use_fused_kernels": True}}
"""For delta nets, whose states would run on in a packed row."""
QUICK = ("Gemma3ForCausalLM", "GraniteForCausalLM")
"""Layers with and without a window, and a model that divides its logits. A mixture of experts is in
test_experts.py."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES if name not in TOWERS],
)
def test_a_family_trains_the_same_however_its_sequences_are_laid_out(run_engine, tmp_path, name):
    """Compares the loss and the gradient norm of two steps in float32 with activation
    checkpointing.
    """
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(make_family(name, tmp_path / "source", vocab_size=len(tokenizer)))
    quantize_checkpoint(tmp_path / "source", tmp_path / "model", progress=False)
    single = {"mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32"}, "lr_warmup_steps": 0}
    variants = PADDED if get_architecture({"architectures": [name]}).delta_nets else VARIANTS
    (report,) = run_engine(tmp_path / "model", tmp_path / "r", variants=variants, **single)
    padded = report["padded"]
    assert padded["loss"][0] != padded["loss"][1] and min(padded["grad_norm"]) > 0
    for other in variants.keys() - {"padded"}:
        assert report[other]["loss"] == pytest.approx(padded["loss"], rel=1e-4, abs=1e-5)
        assert report[other]["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-3)
