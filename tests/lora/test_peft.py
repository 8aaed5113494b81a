"""Tests LoRA on NVFP4 layers: numbers against float64, and PEFT's own behaviour around them."""

import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4
from qerl_verl.lora.peft import NVFP4LoraLinear, linear_names, register_nvfp4, save_adapter
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, swap_linears


def nvfp4_layer(out_features=48, in_features=64, bias=True, seed=0) -> NVFP4Linear:
    torch.manual_seed(seed)
    weight = torch.randn(out_features, in_features)
    layer = NVFP4Linear(in_features, out_features, bias, torch.float32)
    scale = nvfp4_global_scale(weight.abs().max())
    packed, block = quantize_nvfp4(weight, scale)
    for place, new in zip(layer.weight_bytes(), (packed, block), strict=True):
        place.copy_(new.view(torch.uint8))
    layer.weight_global_scale = scale.reshape(1)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nvfp4_layer()

    def forward(self, x):
        return self.proj(x)


def wrap(model=None, **settings) -> PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["proj"], **settings})
    return get_peft_model(model or Net(), register_nvfp4(config))


def randomize(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)


def test_outputs_and_gradients_match_float64():
    model = wrap()
    layer = model.base_model.model.proj
    assert isinstance(layer, NVFP4LoraLinear)
    randomize(model)
    x = torch.randn(3, 7, 64, requires_grad=True)
    y = model(x)
    y.backward(upstream := torch.randn_like(y))

    w = layer.base_layer.dequantize(torch.float64)
    a = layer.lora_A["default"].weight.detach().double().requires_grad_()
    b = layer.lora_B["default"].weight.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    y64 = x64 @ w.T + layer.base_layer.bias.double() + (x64 @ a.T @ b.T) * 2.0
    y64.backward(upstream.double())

    def error(found, expected):
        return ((found.double() - expected).norm() / expected.norm()).item()

    assert error(y, y64) < 1e-6
    assert error(x.grad, x64.grad) < 1e-6
    assert error(layer.lora_A["default"].weight.grad, a.grad) < 1e-6
    assert error(layer.lora_B["default"].weight.grad, b.grad) < 1e-6
    assert layer.base_layer.weight_joined.grad is None and layer.base_layer.bias.grad is None


def test_autocast_computes_in_bfloat16_and_stays_within_its_rounding():
    model = wrap()
    randomize(model)
    x = torch.randn(5, 64)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert ((y.float() - exact).norm() / exact.norm()).item() < 1e-2


def test_gradient_checkpointing_gives_the_same_gradients():
    model = wrap()
    randomize(model)
    x = torch.randn(5, 64, requires_grad=True)
    plain = torch.autograd.grad(model(x).square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), [x, *(p for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))


def calls(monkeypatch) -> list:
    """Records each call of the fused function of the plain case."""
    from qerl_verl.lora import peft

    found, fused = [], peft.nvfp4_lora_linear
    monkeypatch.setattr(peft, "nvfp4_lora_linear", lambda *args: found.append(args) or fused(*args))
    return found


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_the_plain_case_is_fused_and_equals_pefts_own_forward(monkeypatch, settings):
    found, model = calls(monkeypatch), wrap(**settings)
    randomize(model)
    layer, x = model.base_model.model.proj, torch.randn(3, 7, 64, requires_grad=True)
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    ours, upstream = model(x), torch.randn(3, 7, 48)
    theirs = super(NVFP4LoraLinear, layer).forward(x)
    assert len(found) == 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad(y, wanted, upstream) for y in (ours, theirs))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def _two_adapters(model):
    model.add_adapter("other", register_nvfp4(LoraConfig(r=2, target_modules=["proj"])))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.parametrize(
    ("settings", "prepare"),
    [
        ({"lora_dropout": 0.1}, lambda model: None),
        ({"lora_bias": True}, lambda model: None),
        ({}, _two_adapters),
        ({}, lambda model: model.base_model.disable_adapter_layers()),
    ],
    ids=["dropout", "lora_bias", "two adapters", "disabled"],
)
def test_every_other_case_is_pefts(monkeypatch, settings, prepare):
    found, model = calls(monkeypatch), wrap(**settings)
    prepare(model)
    randomize(model)
    layer, x = model.base_model.model.proj.eval(), torch.randn(5, 64)
    assert torch.equal(layer(x), super(NVFP4LoraLinear, layer).forward(x))
    w = layer.base_layer.dequantize(torch.float32)
    expected = x @ w.t() + layer.base_layer.bias
    for name in () if layer.disable_adapters else layer.active_adapters:
        expected = expected + layer.lora_B[name](layer.lora_A[name](x)) * layer.scaling[name]
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert found == []


def test_an_adapter_for_each_row_of_a_batch_is_pefts(monkeypatch):
    found, model = calls(monkeypatch), wrap()
    _two_adapters(model)
    randomize(model)
    model.eval()
    x = torch.randn(2, 3, 64)
    layer = model.base_model.model.proj
    y = layer(x, adapter_names=["default", "__base__"])
    torch.testing.assert_close(y[1], layer.base_layer(x[1]), rtol=1e-5, atol=1e-5)
    assert (y[0] - layer.base_layer(x[0])).abs().max() > 0.1 and found == []


def test_a_change_of_adapter_is_seen(monkeypatch):
    found, model = calls(monkeypatch), wrap()
    _two_adapters(model)
    randomize(model)
    x = torch.randn(5, 64)
    model.set_adapter("default")
    first = model(x)
    model.set_adapter("other")
    assert len(found) == 1 and not torch.equal(model(x), first) and len(found) == 2


def test_only_the_adapter_trains_and_disabling_it_gives_the_base():
    model = wrap()
    randomize(model)
    trainable = {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"lora_A", "lora_B"}
    x = torch.randn(5, 64)
    with model.disable_adapter():
        assert torch.equal(model(x), model.base_model.model.proj.base_layer(x))
    assert not torch.equal(model(x), model.base_model.model.proj.base_layer(x))


def test_merging_and_what_reads_the_weight_raises_with_the_reason():
    with pytest.raises(ValueError, match="lost when it is rounded to NVFP4"):
        wrap().merge_and_unload()
    with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
        wrap(init_lora_weights="pissa")
    with pytest.raises(ValueError, match="use_dora"):
        wrap(use_dora=True)


def test_an_input_width_off_the_block_is_refused():
    with pytest.raises(ValueError, match="in_features=72"):
        NVFP4Linear(72, 16, False, torch.float32)
    NVFP4Linear(48, 16, False, torch.float32, storage_dtype=torch.float32)
    with pytest.raises(ValueError, match="out_features=6: .* whole items of torch.float32"):
        NVFP4Linear(48, 6, False, torch.float32, storage_dtype=torch.float32)


def test_the_storage_dtype_changes_no_number(nvfp4_checkpoint):
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(build(nvfp4_checkpoint)(ids).logits, build(nvfp4_checkpoint, torch.bfloat16)(ids).logits)


def build(folder, storage_dtype=torch.uint8) -> nn.Module:
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    swap_linears(model, packed_linear_names(folder), torch.float32, storage_dtype)
    load_tensors(model, folder, torch.float32)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.requires_grad_(False)


def test_a_loaded_checkpoint_is_the_dequantized_model(nvfp4_checkpoint, dequantized_checkpoint):
    ids = torch.arange(20)[None]
    reference = AutoModelForCausalLM.from_pretrained(dequantized_checkpoint, dtype=torch.float32)
    with torch.no_grad():
        found, expected = build(nvfp4_checkpoint)(ids).logits, reference(ids).logits
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_all_linear_is_everything_but_the_output_layer(nvfp4_checkpoint):
    assert linear_names(build(nvfp4_checkpoint)) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_a_saved_adapter_loads_in_stock_peft(tmp_path, nvfp4_checkpoint, dequantized_checkpoint):
    base = build(nvfp4_checkpoint)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=linear_names(base))
    model = get_peft_model(base, register_nvfp4(config))
    randomize(model)
    save_adapter(tmp_path / "adapter", get_peft_model_state_dict(model), model.peft_config["default"], "some/base")

    stock = AutoModelForCausalLM.from_pretrained(dequantized_checkpoint, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(stock, tmp_path / "adapter")
    assert loaded.peft_config["default"].base_model_name_or_path == "some/base"
    ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = model(ids).logits, loaded(ids).logits
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


def test_a_checkpoint_that_does_not_fit_says_what_is_missing(tmp_path, nvfp4_checkpoint):
    folder = shutil.copytree(nvfp4_checkpoint, tmp_path / "broken")
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.surprise"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="missing .*model.norm.weight.*unexpected .*model.surprise"):
        build(folder)


@pytest.mark.parametrize(
    "name", ["layers.0.self_attn.k_scale", "layers.1.self_attn.v_proj.output_scale", "rotary_emb.inv_freq"]
)
def test_what_no_engine_computes_with_is_passed_over(tmp_path, nvfp4_checkpoint, name):
    folder = shutil.copytree(nvfp4_checkpoint, tmp_path / "more")
    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file) | {f"model.{name}": torch.ones(2)}, file)
    assert build(folder).state_dict().keys() == build(nvfp4_checkpoint).state_dict().keys()
