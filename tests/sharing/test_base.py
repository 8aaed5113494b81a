"""Tests a transformers model on one block of shared memory against one with its own weights."""

import copy

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qerl_verl.kernels.backends import BACKENDS, HopperBackend, get_backend
from qerl_verl.nvfp4.architectures import get_architecture, supported_architectures
from qerl_verl.nvfp4.candidates import CANDIDATES
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, swap_linears
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.sharing.base import OtherSide, attach, load_base, plan_layout
from qerl_verl.sharing.errors import SharingError
from qerl_verl.sharing.layout import Layout
from qerl_verl.sharing.memory import SharedMemory
from tests.helpers.tiny_families import make_family

SHARING = [name for name in supported_architectures() if get_architecture({"architectures": [name]}).shares_base]
CPU, BF16 = torch.device("cpu"), torch.bfloat16
OTHER = OtherSide("auto", CANDIDATES, 8, BF16)


def empty_model(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=BF16)
    swap_linears(model, packed_linear_names(checkpoint), BF16)
    return model.requires_grad_(False).eval()  # Seed-OSS has dropout


def plan(model, other=OTHER, kernel="auto", dtype=BF16):
    return plan_layout(model, get_architecture(model.config), CPU, dtype, kernel, other)


@pytest.fixture(scope="module")
def shared(nvfp4_checkpoint):
    model = empty_model(nvfp4_checkpoint)
    layout = plan(model)
    memory = SharedMemory.allocate(layout.size, CPU)
    layout, kernels = load_base(empty_model(nvfp4_checkpoint), nvfp4_checkpoint, layout, memory, BF16, BF16, "auto")
    attach(model, layout, memory.data)
    return model, memory, layout, kernels


def test_the_model_computes_the_same_bits(shared, nvfp4_checkpoint):
    own = empty_model(nvfp4_checkpoint)
    load_tensors(own, nvfp4_checkpoint, BF16)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(shared[0](ids).logits, own(ids).logits)


@pytest.mark.parametrize("name", SHARING)
def test_every_family_that_shares_computes_the_same_bits(name, tmp_path):
    make_family(name, tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed", progress=False)
    own, attached = empty_model(tmp_path / "packed"), empty_model(tmp_path / "packed")
    load_tensors(own, tmp_path / "packed", BF16)
    layout = plan(attached)
    memory = SharedMemory.allocate(layout.size, CPU)
    layout, _ = load_base(empty_model(tmp_path / "packed"), tmp_path / "packed", layout, memory, BF16, BF16, "auto")
    attach(attached, layout, memory.data)
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        assert torch.equal(attached(ids).logits, own(ids).logits)
    assert not any("embed_tokens" in name or "lm_head" in name for name, _ in attached.named_parameters())


def test_fused_linears_are_one_matrix_and_the_projections_views_of_it(shared, nvfp4_checkpoint):
    model, memory, layout, _ = shared
    stored = load_file(next(nvfp4_checkpoint.glob("*.safetensors")))
    parts = [group.parts for group in layout.groups]
    prefix = "model.layers.1.self_attn."
    assert tuple(prefix + name for name in ("q_proj", "k_proj", "v_proj")) in parts and len(parts) == 2 * 4
    for group in layout.groups:
        packed, scale = group.views(memory.data)
        assert torch.equal(packed, torch.cat([stored[f"{part}.weight_packed"] for part in group.parts]))
        assert torch.equal(scale, torch.cat([stored[f"{part}.weight_scale"].view(torch.uint8) for part in group.parts]))
        assert list(group.global_scales) == [stored[f"{part}.weight_global_scale"].item() for part in group.parts]
        for part in group.parts:
            inside = model.get_submodule(part).weight_bytes()
            assert all(memory.data.data_ptr() <= t.data_ptr() < memory.data.data_ptr() + layout.size for t in inside)
            assert inside[0].data_ptr() == group.views(memory.data, part)[0].data_ptr()


def test_what_is_shared_is_no_parameter_and_stays_where_it_is(shared):
    model, memory, layout, _ = shared
    model = copy.copy(model)
    names = {name for name, _ in model.named_parameters()}
    assert names == {name for name, plain in layout.tensors.items() if not plain.shared}
    assert not any("embed_tokens" in name or name.endswith(".weight_joined") for name in model.state_dict())
    before = model.get_input_embeddings().weight.data_ptr()
    model.to(torch.float64).to(BF16)
    assert model.get_input_embeddings().weight.data_ptr() == before


def test_embeddings_have_room_for_the_rollouts_padding(shared):
    _, memory, layout, _ = shared
    plain = layout.tensors["model.embed_tokens.weight"]
    assert plain.shared and plain.room % 64 == 0 and plain.room >= plain.shape[0]
    assert not plain.view(memory.data, plain.room)[plain.shape[0] :].any()


def test_another_dtype_shares_the_packed_weights_alone(nvfp4_checkpoint):
    layout = plan(empty_model(nvfp4_checkpoint), OtherSide("auto", CANDIDATES, 8, torch.float32))
    assert not any(plain.shared for plain in layout.tensors.values()) and len(layout.groups) == 8
    packed = sum(sum(g.rows) * g.columns * 9 // 16 for g in layout.groups)
    assert layout.shared_bytes() == packed


def test_the_description_survives_the_way_to_another_process(shared):
    layout = shared[2]
    assert Layout.from_json(layout.to_json()) == layout
    with pytest.raises(ValueError, match="format 0"):
        Layout.from_json(layout.to_json().replace('"format": 2', '"format": 0'))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (OtherSide("hopper", CANDIDATES, 8, BF16), "qerl.rollout.kernel=hopper cannot run on cpu"),
        (OtherSide("auto", (HopperBackend(),), 8, BF16), "nothing serves .*q_proj"),
    ],
)
def test_what_cannot_be_shared_is_told_with_the_reason(nvfp4_checkpoint, other, message):
    with pytest.raises(SharingError, match=message):
        plan(empty_model(nvfp4_checkpoint), other)


@pytest.mark.parametrize(("unit", "whole"), [(1, True), (100, False)])
def test_projections_that_do_not_fill_a_layouts_units_are_laid_out_by_themselves(
    nvfp4_checkpoint, monkeypatch, unit, whole
):
    monkeypatch.setattr(type(get_backend("pytorch")), "fused_row_multiple", unit)
    groups = plan(empty_model(nvfp4_checkpoint)).groups
    assert {group.whole for group in groups if len(group.parts) > 1} == {whole}
    assert all(group.whole for group in groups if len(group.parts) == 1)


def test_the_mlp_of_72b_is_shared(monkeypatch):
    """29,568 rows are 115.5 groups of Hopper's layout."""
    monkeypatch.setattr(HopperBackend, "unsupported_device", lambda self, device: None)
    sizes = dict(hidden_size=8192, intermediate_size=29568, num_hidden_layers=1, num_attention_heads=64)
    config = Qwen2Config(**sizes, num_key_value_heads=8, vocab_size=256, architectures=["Qwen2ForCausalLM"])
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config).to(BF16)
    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    swap_linears(model, names, BF16)
    made = plan_layout(model, get_architecture(config), torch.device("cuda", 0), BF16, "auto", OTHER)
    assert {group.parts[0].rsplit(".")[-1]: (group.backend, group.whole) for group in made.groups} == {
        "q_proj": ("hopper", True),
        "o_proj": ("hopper", True),
        "gate_proj": ("hopper", False),
        "down_proj": ("hopper", True),
    }


def test_other_kernels_in_the_rollout_are_told(nvfp4_checkpoint, monkeypatch):
    marlin = CANDIDATES[1]
    monkeypatch.setattr(type(marlin), "unsupported_device", lambda self, device: None)
    with pytest.raises(SharingError, match="the actor computes .*qkv|q_proj.* with pytorch, the rollout with marlin"):
        plan(empty_model(nvfp4_checkpoint))


def test_a_fused_linear_that_is_half_in_16_bits_is_told(nvfp4_checkpoint):
    model = empty_model(nvfp4_checkpoint)
    model.model.layers[0].self_attn.q_proj = torch.nn.Linear(128, 128, device="meta")
    with pytest.raises(SharingError, match="model.layers.0.self_attn.q_proj is not in NVFP4, and the rollout fuses it"):
        plan(model)


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_the_stack_of_prepacked_projections_is_the_prepacked_stack(name):
    """One weight can therefore serve a fused layer and its projections."""
    backend = next(b for b in BACKENDS if b.name == name)
    torch.manual_seed(0)
    unit, k = backend.fused_row_multiple, 192
    parts = [
        (torch.randint(0, 256, (n, k // 2), dtype=torch.uint8), torch.randint(1, 127, (n, k // 16), dtype=torch.uint8))
        for n in (max(unit, 64) * 2, max(unit, 64), 320)
    ]
    made = [backend.prepack(*part) for part in parts]
    stacked = backend.prepack(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    for whole, pieces in zip(stacked, zip(*made, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(pieces))


def test_a_placed_layer_refuses_memory_of_another_shape():
    layer = NVFP4Linear(64, 32, False, BF16)
    with pytest.raises(ValueError, match="cannot be placed"):
        layer.place(torch.empty(32, 16, dtype=torch.uint8), torch.empty(32, 4, dtype=torch.uint8))
