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
from tests.helpers.tiny_families import FAMILIES, Reference, actor, log_probabilities, make_adapter, make_family

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
