"""The table of architectures against the models of transformers."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from qerl_verl.nvfp4.architectures import UnsupportedArchitecture, get_architecture, supported_architectures
from qerl_verl.nvfp4.errors import CheckpointError

SIZES = dict(vocab_size=48, hidden_size=32, intermediate_size=80, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "Qwen2ForCausalLM": lambda **kw: Qwen2Config(**SIZES, **kw),
    "Qwen3ForCausalLM": lambda **kw: Qwen3Config(**SIZES, head_dim=16, **kw),
    "LlamaForCausalLM": lambda **kw: LlamaConfig(**SIZES, **kw),
    "MistralForCausalLM": lambda **kw: MistralConfig(**SIZES, **kw),
}
VARIANTS = [
    *((name, {}) for name in CONFIGS),
    *((name, {"tie_word_embeddings": True}) for name in CONFIGS),
    ("Qwen3ForCausalLM", {"attention_bias": True}),
    ("LlamaForCausalLM", {"attention_bias": True}),
    ("LlamaForCausalLM", {"mlp_bias": True}),
    ("LlamaForCausalLM", {"head_dim": 24}),
]


def build(name, **kwargs):
    config = CONFIGS[name](architectures=[name], **kwargs)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == name
    return config, model


def test_the_table_is_what_these_tests_cover():
    assert set(supported_architectures()) == set(CONFIGS)


@pytest.mark.parametrize("name, kwargs", VARIANTS)
def test_tensor_shapes_are_those_of_the_model(name, kwargs):
    config, model = build(name, **kwargs)
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if kwargs.get("tie_word_embeddings"):
        del want["lm_head.weight"]
    assert get_architecture(config).tensor_shapes(config) == want


@pytest.mark.parametrize("name", CONFIGS)
def test_linears_are_all_but_lm_head(name):
    config, model = build(name)
    architecture = get_architecture(config)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    assert linears == {f"{architecture.layer_prefix}{i}.{n}" for i in range(2) for n in architecture.linears}
    assert sorted(n for group in architecture.scale_groups() for n in group) == sorted(architecture.linears)


@pytest.mark.parametrize("name", CONFIGS)
def test_each_norm_feeds_exactly_the_named_linears(name):
    """The tensor that a norm returns is the very tensor its linears get, and no other linear gets it."""
    config, model = build(name)
    architecture = get_architecture(config)
    outputs, inputs = {}, {}
    for module_name, module in model.named_modules():
        if module_name.startswith(architecture.layer_prefix) and module_name.endswith("norm"):
            module.register_forward_hook(lambda m, args, out, key=module_name: outputs.__setitem__(key, out))
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, args, out, key=module_name: inputs.__setitem__(key, args[0]))
    model(torch.arange(6).view(1, 6))

    for i in range(config.num_hidden_layers):
        layer = f"{architecture.layer_prefix}{i}."
        for norm, linears in architecture.noise_targets.items():
            fed = {key for key, value in inputs.items() if value is outputs[layer + norm]}
            assert fed == {layer + linear for linear in linears}


@pytest.mark.parametrize("name", CONFIGS)
def test_lookup_by_dict_or_object(name):
    assert get_architecture({"architectures": [name]}).name == name
    assert get_architecture(SimpleNamespace(architectures=[name])) is get_architecture({"architectures": [name]})


@pytest.mark.parametrize(
    "config, named",
    [
        ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM"),
        ({"architectures": ["Qwen2_5_VLForConditionalGeneration"]}, "Qwen2_5_VLForConditionalGeneration"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({}, "none"),
        (SimpleNamespace(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
    ],
)
def test_others_are_refused_by_name(config, named):
    with pytest.raises(UnsupportedArchitecture) as error:
        get_architecture(config)
    assert isinstance(error.value, CheckpointError) and isinstance(error.value, ValueError)
    assert named in str(error.value)
    assert all(name in str(error.value) for name in CONFIGS)
