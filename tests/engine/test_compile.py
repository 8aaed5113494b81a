"""Tests compiled norms and activation functions between NVFP4 layers that are not compiled."""

import contextvars

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from qerl_verl.engine import compile as engine_compile
from qerl_verl.engine.compile import CompiledMLP, compile_layers, unavailable
from qerl_verl.engine.recompute import Recompute
from qerl_verl.kernels.nvfp4_quantize import quantize_nvfp4
from qerl_verl.lora.peft import linear_names, register_nvfp4
from qerl_verl.nvfp4.architectures import automatic_class, get_architecture
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.loading import prepack_linears, swap_linears
from qerl_verl.platform import compilers
from tests.helpers.tiny_families import FAMILIES, make_config

CPU, VOCABULARY = torch.device("cpu"), 128
ROUNDING = 10 * torch.finfo(torch.bfloat16).eps
"""What other kernels may change in a gradient that goes through some ten roundings to bfloat16
one after the other."""
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": VOCABULARY,
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def make_model(config, recompute="full", device=CPU, prepare=lambda model: None):
    """Makes a model with random NVFP4 linears and adapters, and activation checkpointing.

    ``prepare`` is called where the engine compiles.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    weights = {
        n: m.weight.detach().float() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n
    }
    swap_linears(model, set(weights), torch.bfloat16)
    for name, layer in model.named_modules():
        if isinstance(layer, NVFP4Linear):
            packed, scale = quantize_nvfp4(weights[name], torch.tensor([3000.0]))
            layer.weight_joined.data = torch.cat([packed.flatten(), scale.view(torch.uint8).flatten()])
            layer.weight_global_scale.fill_(3000.0)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    model.to(device).requires_grad_(False)
    prepack_linears(model, device)
    prepare(model)
    model.enable_input_require_grads()
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=8, target_modules=linear_names(model))
    model = get_peft_model(model, register_nvfp4(lora))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, device=device) * 0.05
    checkpointing = {"use_reentrant": False, "context_fn": Recompute(recompute, device).context_fn}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model.train()


def step(model, batch, length, padded=0):
    """Returns logits without autograd and adapter, as of a reference; logits with it; and its
    gradients.
    """
    device = model.device
    ids = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length)).to(device)
    inputs = {"input_ids": ids, "use_cache": False}
    if padded:
        inputs["attention_mask"] = torch.ones_like(ids)
        inputs["attention_mask"][0, length - padded :] = 0
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad(), model.disable_adapter():
            base = model(**inputs).logits
        with torch.no_grad():
            logits = model(**inputs).logits
        loss = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1).float(), ids.flatten())
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    return base.float(), logits.float(), gradient


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


SHAPES = [(4, 24), (2, 40, 7), (1, 17), (1, 33), (3, 9)]
"""Sequences, tokens and how many of them are padding: a first shape, another of both, one
sequence, and again of each."""


@pytest.mark.parametrize(
    ("recompute", "shapes"), [pytest.param("full", SHAPES, marks=pytest.mark.slow), ("selective", SHAPES[:3])]
)
def test_the_same_numbers_for_batches_of_every_shape(recompute, shapes):
    plain = make_model(Qwen3Config(**SIZES), recompute)
    said = []
    compiled = make_model(
        Qwen3Config(**SIZES), recompute, prepare=lambda m: said.append(compile_layers(m, backend="aot_eager"))
    )
    assert said[0].startswith("input_layernorm, k_norm, mlp.act_fn, norm, post_attention_layernorm, q_norm by")
    for shape in shapes:
        for found, wanted in zip(step(compiled, *shape), step(plain, *shape), strict=True):
            assert torch.equal(found, wanted), shape
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0 and not counters["graph_break"]
    for shape in shapes:
        step(compiled, *shape)
    assert counters["stats"]["unique_graphs"] == graphs, "shapes seen before are compiled again"


@pytest.mark.slow
def test_no_shape_is_one_too_many_also_in_another_thread():
    """A worker of verl compiles in one task and trains in others. From 2.12 on, PyTorch's settings
    belong to a thread and a task.
    """
    model = make_model(Qwen3Config(**SIZES))
    contextvars.copy_context().run(compile_layers, model, backend="aot_eager")
    for shape in [(4, 24), (2, 40), (1, 17), (1, 1), (3, 1)]:
        step(model, *shape)
    norms = counters["stats"]["unique_graphs"]
    assert norms > 16 and not any("recompile_limit" in reason for reason in counters["unimplemented"])
    with torch._dynamo.config.patch(recompile_limit=1000):
        torch._dynamo.reset()
        counters.clear()
        for shape in [(4, 24), (2, 40), (1, 17), (1, 1), (3, 1)]:
            step(model, *shape)
    assert counters["stats"]["unique_graphs"] == norms


def test_attention_is_left_alone_but_for_its_norms():
    model = make_model(Qwen3Config(**SIZES))
    compile_layers(model, backend="aot_eager")
    layer = model.get_base_model().model.layers[0]
    compiled = {name for name, module in layer.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}


OTHER_MLPS = ("Phi3ForCausalLM", "Glm4ForCausalLM", "SeedOssForCausalLM")
"""One matrix for gate and up, or dropout behind the last one."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OTHER_MLPS])
def test_a_compiled_mlp_is_transformers_own_to_the_bit(name):
    """Fails if transformers computes an MLP in another way, or renames its parts."""
    torch.manual_seed(0)
    activation = "hidden_activation" if name == "Gemma3ForCausalLM" else "hidden_act"
    config = make_config(name, **{activation: "gelu"})
    row = get_architecture(config)
    model = automatic_class(row).from_config(config, dtype=torch.bfloat16)
    layer, parameters = model.get_submodule(f"{row.layer_prefix}1"), dict(model.named_parameters())
    x = torch.randn(3, 5, config.get_text_config().hidden_size, dtype=torch.bfloat16)
    expected = layer.mlp(x)
    compile_layers(model, backend="aot_eager")
    tower = model.get_submodule(row.vision.rstrip(".")).modules() if row.vision else ()
    assert not any(m._compiled_call_impl is not None or isinstance(m, CompiledMLP) for m in tower)
    assert isinstance(layer.mlp, CompiledMLP) and torch.equal(layer.mlp(x), expected)
    found = dict(model.named_parameters())
    assert found.keys() == parameters.keys() and all(found[n] is p for n, p in parameters.items())


@pytest.mark.parametrize("name", OTHER_MLPS)
def test_another_kind_of_mlp_stays(name):
    model = AutoModelForCausalLM.from_config(make_config(name))
    before = model.model.layers[0].mlp
    said = compile_layers(model, backend="aot_eager")
    assert model.model.layers[0].mlp is before and "act_fn" not in said and "input_layernorm" in said


def test_where_there_is_nothing_to_compile_that_is_said():
    assert compile_layers(nn.Linear(2, 2)).startswith("nothing by")


@pytest.mark.parametrize(
    ("device", "triton", "found", "variable", "reason"),
    [
        ("cuda", True, ("gcc",), None, None),
        ("cuda", True, ("clang",), None, None),
        ("cuda", True, (), "CC", None),
        ("cuda", True, ("g++",), "CXX", "no C compiler: install gcc or set CC"),
        ("cuda", False, ("gcc",), None, "Triton"),
        ("cpu", False, ("g++",), None, None),
        ("cpu", False, ("clang++",), None, "no C++ compiler: install g++ or set CXX"),
        ("cpu", False, ("gcc",), "CC", "no C++ compiler: install g++ or set CXX"),
        ("cpu", False, (), "CXX", None),
    ],
)
def test_what_is_missing_is_named(monkeypatch, device, triton, found, variable, reason):
    monkeypatch.setattr(engine_compile, "has_triton", lambda: triton)
    monkeypatch.setattr(compilers.shutil, "which", lambda name: name if name in found else None)
    for name in ("CC", "CXX", "TORCH_COMPILE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "a-compiler")
    said = unavailable(torch.device(device))
    assert said is None if reason is None else reason in said
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert "TORCH_COMPILE_DISABLE" in unavailable(torch.device(device))


@pytest.mark.skipif(unavailable(CPU) is not None, reason="needs a C++ compiler")
def test_inductor_stays_within_bfloat16s_rounding():
    model = make_model(Qwen2Config(**SIZES), "selective")
    expected = step(model, 3, 24)
    compile_layers(model)
    for found, wanted in zip(step(model, 3, 24), expected, strict=True):
        assert error(found, wanted) < ROUNDING
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["full", "auto", "selective"])
def test_on_a_gpu_for_batches_of_every_shape(recompute):
    sizes = SIZES | {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 8}
    model = make_model(Qwen2Config(**sizes), recompute, torch.device("cuda", 0))
    shapes = [(4, 24), (2, 40, 7), (1, 17), (16, 512), (1, 33), (3, 9), (16, 512, 100), (4, 24)]
    expected = [step(model, *shape) for shape in shapes]
    compile_layers(model)
    for shape, wanted in zip(shapes, expected, strict=True):
        for found, value in zip(step(model, *shape), wanted, strict=True):
            assert error(found, value) < ROUNDING, shape
