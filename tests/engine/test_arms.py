"""Tests the engines of the arms: one initial adapter, verl's own base under bf16, bitsandbytes'
under nf4."""

from importlib.util import find_spec

import pytest
import torch

BITSANDBYTES = find_spec("bitsandbytes") is not None


@pytest.fixture(scope="module")
def arms(run_engine, tmp_path_factory, nvfp4_checkpoint, bf16_checkpoint):
    """Runs two steps in each arm and in verl's stock engine, from the same seed."""
    folder = tmp_path_factory.mktemp("arms")
    plain = {"base": str(bf16_checkpoint), "reference": True}
    variants = {"nvfp4": {"arm": "nvfp4", "reference": True}, "bf16": plain | {"arm": "bf16"}}
    packed = {"use_remove_padding": True, "packed_attention": True}
    packed["mixed_precision"] = {"param_dtype": "fp32", "reduce_dtype": "fp32"}
    variants["bf16_packed"] = plain | packed | {"arm": "bf16"}
    variants["bf16_fused"] = variants["bf16_packed"] | {"use_fused_kernels": True}
    variants["stock"] = {"stock": str(bf16_checkpoint), "reference": True}
    if BITSANDBYTES:
        variants["nf4"] = plain | {"arm": "nf4"}
    (report,) = run_engine(nvfp4_checkpoint, folder / "r", lr_warmup_steps=0, variants=variants)
    return report, {name: torch.load(folder / f"r.{name}.pt") for name in report}


def test_every_arm_starts_from_the_same_adapter(arms):
    report, _ = arms
    ours = [name for name in report if name != "stock"]
    assert len({report[name]["built"] for name in ours}) == 1
    assert all(report[name]["class"] == f"{name.partition('_')[0].upper()}EngineWithLMHead" for name in ours)


def test_every_arm_trains_float32_adapters_of_the_same_names(arms):
    report, adapters = arms
    for name in report:
        assert report[name]["grad_norm"][0] > 0 and adapters[name].keys() == adapters["nvfp4"].keys(), name
        assert name == "stock" or {t.dtype for t in adapters[name].values()} == {torch.float32}


def test_the_base_of_bf16_is_verls_own(arms):
    report, _ = arms
    assert report["bf16"]["without"] == report["stock"]["without"] != report["nvfp4"]["without"]


def test_log_probabilities_in_chunks_are_those_of_the_logits(arms):
    """This holds in float32; in bfloat16 verl rounds the logits, which the chunks do not."""
    report, _ = arms
    for value in ("loss", "grad_norm"):
        assert report["bf16_fused"][value] == pytest.approx(report["bf16_packed"][value], rel=1e-4, abs=1e-6)


@pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes is not installed")
def test_the_base_of_nf4_is_near_the_16_bit_one_and_none_of_the_others(arms):
    report, _ = arms
    base, nf4 = (torch.tensor(report[name]["without"]) for name in ("bf16", "nf4"))
    assert 0 < (nf4 - base).abs().mean() < 0.5
    assert report["nf4"]["without"] != report["nvfp4"]["without"]


@pytest.mark.skipif(not BITSANDBYTES, reason="bitsandbytes is not installed")
def test_two_ranks_train_one_adapter_on_an_nf4_base_that_each_holds_whole(run_engine, tmp_path, bf16_checkpoint):
    one = run_engine(bf16_checkpoint, tmp_path / "one", arm="nf4", steps=2)
    two = run_engine(bf16_checkpoint, tmp_path / "two", world=2, arm="nf4", steps=2)
    assert one[0]["built"] == two[0]["built"] == two[1]["built"] and two[0]["adapter"] == two[1]["adapter"]
    for found, expected in zip(two[0]["steps"], one[0]["steps"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    packed = [p for n, p in two[0]["parameters"].items() if n.endswith("base_layer.weight")]
    assert len(packed) == 2 * 7 and all(p["local_bytes"] == p["bytes"] for p in packed)
    assert {p["dtype"] for p in packed} == {"torch.uint8"}
