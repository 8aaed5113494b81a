"""Tests verl's own training path (train_batch, infer_batch) with the settings of its example
scripts.

Offloading and layered summoning move bytes and must change none. What activation checkpointing
keeps does not matter either. Packing, another split into micro-batches and compiling change the
order of sums: in float32 the loss agrees to 1e-5, the gradient norm to 1e-4 of it, and two updates
of the adapter to 1e-3 of their length (Adam's first updates are the gradients' signs, so the
smallest gradients count like the largest).
"""

import math

import pytest
import torch

from qerl_verl.engine.compile import unavailable

EXACT = {
    "param_offload": {"param_offload": True},
    "optimizer_offload": {"optimizer_offload": True},
    "both_offloads": {"param_offload": True, "optimizer_offload": True},
    "layered_summon": {"layered_summon": True},
    "reference": {"reference": True},
    "selective": {"recompute": "selective"},
    "no_checkpointing": {"gradient_checkpointing": False},
    "no_compiling": {"use_torch_compile": True, "no_compiling": True},
}
NOTHING = {"norms": 0, "mlps": 0, "entropy": False}
IN_FLOAT32 = {"mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32"}}
CLOSE = {
    "use_dynamic_bsz": {"use_dynamic_bsz": True},
    "use_remove_padding": {"use_remove_padding": True},
    "remove_padding_and_dynamic_bsz": {"use_remove_padding": True, "use_dynamic_bsz": True},
    "compiled_dynamic_bsz": {"use_dynamic_bsz": True, "use_torch_compile": True, "recompute": "selective"},
}


@pytest.fixture(scope="module", params=["language_model", "value_model"])
def variants(request, run_engine, tmp_path_factory, nvfp4_checkpoint):
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"plain": {}, **EXACT, "plain_float32": IN_FLOAT32}
    settings |= {name: variant | IN_FLOAT32 for name, variant in CLOSE.items()}
    settings["float16"] = {"mixed_precision": {"param_dtype": "fp16", "reduce_dtype": "fp32"}}
    if request.param == "value_model":
        del settings["layered_summon"]  # a way to send an adapter to the rollout
    (report,) = run_engine(
        nvfp4_checkpoint, folder / "r", model_type=request.param, lr_warmup_steps=0, variants=settings
    )
    adapters = {name: torch.load(folder / f"r.{name}.pt") for name in ("start", *report)}
    graded = ("plain", "plain_float32", "float16")
    adapters |= {f"{name}_grad": torch.load(folder / f"r.{name}_grad.pt") for name in graded}
    return request.param, report, adapters


@pytest.mark.parametrize("name", EXACT)
def test_moving_bytes_changes_none(variants, name):
    _, report, adapters = variants
    if name not in report:
        pytest.skip("a critic sends nothing to the rollout")
    for quantity in ("loss", "grad_norm", "peft_config"):
        assert report[name][quantity] == report["plain"][quantity]
    assert report[name]["compiled"] == report["plain"]["compiled"] == NOTHING
    assert adapters[name].keys() == adapters["plain"].keys()
    assert all(torch.equal(adapters[name][n], t) for n, t in adapters["plain"].items())


def distance(a, b):
    return sum((a[n] - b[n]).square().sum() for n in b).sqrt()


@pytest.mark.parametrize("name", CLOSE)
def test_packing_and_splitting_leave_loss_and_update_alone(variants, name):
    _, report, adapters = variants
    found, plain = report[name], report["plain_float32"]
    assert found["loss"] == pytest.approx(plain["loss"], abs=1e-5)
    assert found["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    moved = distance(adapters["plain_float32"], adapters["start"])
    assert distance(adapters[name], adapters["plain_float32"]) < 1e-3 * moved
    if "dynamic_bsz" in name:
        assert found["micro_batches"] > plain["micro_batches"]
    compiled = "compiled" in name and unavailable(torch.device("cpu")) is None
    assert found["compiled"] == ({"norms": 5, "mlps": 2, "entropy": True} if compiled else NOTHING)


def test_float16_computes_the_same_to_its_rounding(variants):
    """The gradient is nearer to the float32 one than bfloat16's, whose rounding is eight times as
    coarse.
    """
    _, report, adapters = variants
    reference = adapters["plain_float32_grad"]

    def error(name):
        return distance(adapters[f"{name}_grad"], reference)

    assert 0 < error("float16") < error("plain") / 2
    # a log-probability of the order of log(vocabulary), rounded
    rounding = torch.finfo(torch.float16).eps * math.log(200)
    assert report["float16"]["loss"] == pytest.approx(report["plain_float32"]["loss"], rel=rounding, abs=rounding)


def test_the_reference_is_the_base_without_the_adapter(variants):
    """A fresh adapter adds nothing, so the first log-probabilities are the base's; a critic has no
    reference.
    """
    model_type, report, _ = variants
    seen = report["reference"]
    assert seen["with"] != seen["fresh"]
    if model_type == "language_model":
        assert seen["without"] == seen["fresh"]
    else:
        assert seen["without"] == seen["with"]
