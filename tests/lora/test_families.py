"""Tests every family of the table in the actor, with PEFT's adapter, against a float64 model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from qerl_verl.engine.output_layer import use_logprob_layer
from qerl_verl.lora.adapter_files import check_loaded
from qerl_verl.lora.experts import split_experts, stack_experts
from qerl_verl.lora.peft import adaptable_layers, linear_names, published, register_nvfp4, tower_of
from qerl_verl.lora.targets import all_linear, without_tower
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.loading import packed_linear_names
from qerl_verl.nvfp4.model_shapes import adaptable_shapes
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from tests.helpers.tiny_families import (
    ALPHA,
    FAMILIES,
    RANK,
    Reference,
    actor,
    log_probabilities,
    make_adapter,
    make_family,
)

PROMPTS = [list(range(3, 35)), [7, 7, 8, 9] * 9]
"""Longer than the sliding windows of the tiny models."""


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_the_actor(tmp_path, name):
    """Log-probabilities equal those of the float64 model: without adapter, with one, and from the
    output layer that returns them.
    """
    quantize_checkpoint(make_family(name, tmp_path / "source"), tmp_path / "quantized", progress=False)
    reference, model = Reference(tmp_path / "quantized"), actor(tmp_path / "quantized")
    linears = adaptable_shapes(tmp_path / "quantized")
    packed = packed_linear_names(tmp_path / "quantized")
    single = {name for name in packed if ".experts." not in name}
    assert {n for n, m in model.named_modules() if isinstance(m, NVFP4Linear)} == single and packed >= set(linears)
    reference.check(PROMPTS, [log_probabilities(model, prompt).tolist() for prompt in PROMPTS])

    saved = load_file(make_adapter(tmp_path / "adapter", linears) / "adapter_model.safetensors")
    config, tensors = LoraConfig.from_pretrained(tmp_path / "adapter"), stack_experts(saved)
    assert sorted(all_linear(linears)) == linear_names(model) and adaptable_layers(model) == linears
    config.exclude_modules = without_tower(config.exclude_modules, tower_of(model))
    names = config.target_modules
    adapted = get_peft_model(model, register_nvfp4(config, model))
    assert set(published(config).target_modules) == set(names)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in split_experts(tensors).items())
    assert split_experts(tensors).keys() == saved.keys()
    set_peft_model_state_dict(adapted, tensors)
    check_loaded(get_peft_model_state_dict(adapted), tensors)
    with reference.adapted(tmp_path / "adapter"):
        reference.check(PROMPTS, [log_probabilities(adapted, prompt).tolist() for prompt in PROMPTS])
        use_logprob_layer(model)
        found = [adapted(torch.tensor([p]), temperature=1.0, use_cache=False).log_probs[0, :-1] for p in PROMPTS]
        reference.check(PROMPTS, [values.tolist() for values in found])


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_delta_nets(tmp_path, checkpointing):
    """The gradients of every adapter are those of the float64 model, in padded rows of two lengths.

    A weight W + s B A with the gradient G gives B the gradient s G A', and A the gradient s B' G.
    """
    quantize_checkpoint(make_family("Qwen3_5ForCausalLM", tmp_path / "source"), tmp_path / "quantized", progress=False)
    reference, model = Reference(tmp_path / "quantized"), actor(tmp_path / "quantized")
    folder = make_adapter(tmp_path / "adapter", adaptable_shapes(tmp_path / "quantized"))
    tensors, scaling = load_file(folder / "adapter_model.safetensors"), ALPHA / RANK
    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = False
    adapted = get_peft_model(model, register_nvfp4(config, model))
    set_peft_model_state_dict(adapted, tensors)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    rows, inside = torch.zeros(2, 36, dtype=torch.int64), torch.zeros(2, 36, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        rows[row, : len(prompt)], inside[row, : len(prompt)] = torch.tensor(prompt), 1

    def loss(network):
        logits = network(rows, attention_mask=inside, use_cache=False).logits[:, :-1].log_softmax(-1)
        picked = logits.gather(-1, rows[:, 1:, None])[..., 0]
        return (picked * inside[:, 1:]).sum() / inside[:, 1:].sum()

    loss(adapted).backward()
    found = {n: p.grad.double() for n, p in adapted.named_parameters() if p.requires_grad}
    with reference.adapted(folder):
        for network in reference.models:
            network.requires_grad_(True)
            loss(network).backward()
        exact, rounded = ({n: p.grad.double() for n, p in m.named_parameters()} for m in reference.models)
    errors, roundings = [], []
    for name in adaptable_shapes(tmp_path / "quantized"):
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        whole, other = (gradients[f"{name}.weight"] * scaling for gradients in (exact, rounded))
        for part, value, near in (("A", b.T @ whole, b.T @ other), ("B", whole @ a.T, other @ a.T)):
            gradient = found[f"base_model.model.{name}.lora_{part}.default.weight"]
            errors.append((gradient - value).norm() / value.norm())
            roundings.append((near - value).norm() / value.norm())
    assert len(found) == len(errors) == 2 * 13
    assert max(errors) < Reference.MARGIN * max(roundings) < 1e-3
