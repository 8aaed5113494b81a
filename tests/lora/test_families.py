"""Every family of the table in the actor: packed linears, PEFT's adapter on them, against the same
model in float64."""

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tiny_families import FAMILIES, Reference, log_probabilities, make_adapter, make_family
from transformers import AutoConfig

from qerl_verl.engine.output_layer import use_logprob_layer
from qerl_verl.lora.adapter_files import check_loaded
from qerl_verl.lora.peft import linear_names, register_nvfp4, tower_of
from qerl_verl.lora.targets import without_tower
from qerl_verl.nvfp4.architectures import automatic_class, get_architecture
from qerl_verl.nvfp4.checkpoint import adaptable_shapes, quantize_checkpoint
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, swap_linears

PROMPTS = [list(range(3, 35)), [7, 7, 8, 9] * 9]
"""Longer than the sliding windows of the tiny models."""


def actor(quantized):
    """Builds the model as the engine does, in float32."""
    config = AutoConfig.from_pretrained(quantized)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        automatic = automatic_class(get_architecture(config))
        model = automatic.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    swap_linears(model, packed_linear_names(quantized), torch.float32)
    load_tensors(model, quantized, torch.float32)
    return model.requires_grad_(False).eval()


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_the_actor(tmp_path, name):
    """Log-probabilities equal those of the float64 model: without adapter, with one, and from the
    output layer that returns them.
    """
    quantize_checkpoint(make_family(name, tmp_path / "source"), tmp_path / "quantized", progress=False)
    reference, model = Reference(tmp_path / "quantized"), actor(tmp_path / "quantized")
    linears = adaptable_shapes(tmp_path / "quantized")
    packed = {name for name in packed_linear_names(tmp_path / "quantized") if ".experts." not in name}
    assert {n for n, m in model.named_modules() if isinstance(m, NVFP4Linear)} == packed >= set(linears)
    reference.check(PROMPTS, [log_probabilities(model, prompt).tolist() for prompt in PROMPTS])

    tensors = load_file(make_adapter(tmp_path / "adapter", linears) / "adapter_model.safetensors")
    config = LoraConfig.from_pretrained(tmp_path / "adapter")
    assert sorted(config.target_modules) == linear_names(model)
    config.exclude_modules = without_tower(config.exclude_modules, tower_of(model))
    adapted = get_peft_model(model, register_nvfp4(config))
    set_peft_model_state_dict(adapted, tensors)
    check_loaded(get_peft_model_state_dict(adapted), tensors)
    with reference.adapted(tmp_path / "adapter"):
        reference.check(PROMPTS, [log_probabilities(adapted, prompt).tolist() for prompt in PROMPTS])
        use_logprob_layer(model)
        found = [adapted(torch.tensor([p]), temperature=1.0, use_cache=False).log_probs[0, :-1] for p in PROMPTS]
        reference.check(PROMPTS, [values.tolist() for values in found])
