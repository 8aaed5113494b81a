"""Tests Gloo ranks through verl's own training path: exchanged bytes, and equality with one rank.

Everything is compared with one rank on the same eight sequences, three steps from the same adapter.
In float32, with FSDP2's sums in the order of one rank's micro-batches, two ranks differ in nothing
or in the last bits. Ulysses divides other sums: 1e-5 of the loss, 1e-5 of the gradient and 1e-4 of
the adapter's change. By hand the tests also run on four or eight ranks, there also sharded over
pairs of ranks (``fsdp_size=2``):

    QERL_TEST_RANKS=4 python -m pytest tests/engine/test_many_ranks.py
"""

import os

import pytest
import torch

from qerl_verl.engine.compile import unavailable
from qerl_verl.engine.nvfp4 import CARRIER
from qerl_verl.nvfp4.quantize import quantize_checkpoint

WORLD = int(os.environ.get("QERL_TEST_RANKS", "2"))
FLOAT32 = {
    "use_remove_padding": True,
    "packed_attention": True,
    "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32"},
    "steps": 3,
}
VARIANTS = {
    "fsdp": FLOAT32,
    "ulysses": {**FLOAT32, "ulysses": 2},
    "fused": {**FLOAT32, "use_fused_kernels": True},
    "compiled": {**FLOAT32, "use_torch_compile": True, "recompute": "selective"},
}
if WORLD > 2:
    VARIANTS["hybrid_sharding"] = {**FLOAT32, "fsdp_size": 2}
REFUSED = {"ulysses_sdpa": {**VARIANTS["ulysses"], "packed_attention": False, "steps": 1}}


@pytest.fixture(scope="module")
def adapters_and_reports(run_engine, tmp_path_factory, model_factory):
    """Returns adapters and reports of a model whose output layer is untied, so FSDP2 shards it by
    itself.
    """
    folder = tmp_path_factory.mktemp("ranks")
    bf16_checkpoint, nvfp4_checkpoint = folder / "bf16", folder / "nvfp4"
    model_factory(bf16_checkpoint, tie_word_embeddings=False)
    quantize_checkpoint(bf16_checkpoint, nvfp4_checkpoint, progress=False)
    (one,) = run_engine(nvfp4_checkpoint, folder / "one", lr_warmup_steps=0, variants={"one": FLOAT32})
    counted = {
        "packed": {"steps": 1, "count": True},
        "bf16": {"steps": 1, "count": True, "stock": str(bf16_checkpoint)},
    }
    reports = run_engine(
        nvfp4_checkpoint, folder / "many", world=WORLD, lr_warmup_steps=0, variants={**VARIANTS, **REFUSED, **counted}
    )
    adapters = {name: torch.load(folder / f"one.{name}.pt") for name in ("start", "one", "one_grad")}
    adapters |= {name: torch.load(folder / f"many.{name}.pt") for v in VARIANTS | REFUSED for name in (v, f"{v}_grad")}
    return adapters, one["one"], reports


def distance(a, b):
    return sum((a[n] - b[n]).square().sum() for n in b).sqrt().item()


@pytest.mark.parametrize("name", VARIANTS)
def test_three_steps_are_those_of_one_rank(adapters_and_reports, name):
    adapters, one, reports = adapters_and_reports
    found = reports[0][name]
    assert len(found["loss"]) == 3 and found["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert found["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    nothing = {n: torch.zeros_like(t) for n, t in adapters["one_grad"].items()}
    assert distance(adapters[f"{name}_grad"], adapters["one_grad"]) < 1e-5 * distance(nothing, adapters["one_grad"])
    moved = distance(adapters["one"], adapters["start"])
    # other kernels than the one rank's, which is not compiled
    way = 1e-3 if name == "compiled" else 1e-4
    assert moved > 0 and distance(adapters[name], adapters["one"]) < way * moved
    compiled = name == "compiled" and unavailable(torch.device("cpu")) is None
    assert (found["compiled"]["norms"], found["compiled"]["mlps"]) == ((5, 2) if compiled else (0, 0))


def test_ulysses_with_sdpa_is_not_what_one_rank_does(adapters_and_reports):
    """The switch therefore refuses it (config/checks/recipe.py): verl exchanges heads only before
    flash-attn, and gives no message.
    """
    adapters, one, reports = adapters_and_reports
    assert abs(reports[0]["ulysses_sdpa"]["loss"][0] - one["loss"][0]) > 1e-2
    nothing = {n: torch.zeros_like(t) for n, t in adapters["one_grad"].items()}
    assert distance(adapters["ulysses_sdpa_grad"], adapters["one_grad"]) > 0.1 * distance(nothing, adapters["one_grad"])


def test_all_ranks_hold_the_same_adapter_in_the_end(adapters_and_reports):
    _, _, reports = adapters_and_reports
    for name in reports[0]:
        assert len({report[name]["adapter"] for report in reports}) == 1


def test_the_all_gather_moves_the_packed_bytes(adapters_and_reports):
    """It moves 4 bits per value and 8 bits for each 16 values, where bfloat16 takes 2 bytes, in
    forward and backward of both layers.
    """
    _, _, reports = adapters_and_reports
    assert reports[0]["packed"]["bytes_per_weight"] == [0.5625] * 4
    assert reports[0]["bf16"]["bytes_per_weight"] == [2.0] * 4


def test_every_rank_computes_with_the_checkpoints_bytes(adapters_and_reports):
    """On a GPU a 16-bit carrier would fail, see qerl_verl/engine/nvfp4.py, CARRIER."""
    _, _, reports = adapters_and_reports
    assert [report["packed"]["changed_bytes"] for report in reports] == [0] * WORLD


@pytest.mark.gpu
def test_what_copies_in_front_of_an_all_gather_keeps_the_carriers_bytes():
    """It changes bfloat16 bytes. If it no longer does, the carrier may have 16 bits."""
    patterns = torch.arange(1 << 16, dtype=torch.int32, device="cuda").to(torch.int16)

    def copied(dtype):
        # also as 32 bits every exponent there is
        source = torch.stack([patterns, patterns.flip(0)], dim=1).view(-1)
        target = torch.empty_like(source)
        torch._foreach_copy_([target.view(dtype)], [source.view(dtype)])
        return torch.equal(target, source)

    assert copied(CARRIER) and copied(torch.uint8)
    assert not copied(torch.bfloat16) and not copied(torch.float16)
