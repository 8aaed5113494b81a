"""Tests an adapter's configuration among its tensors."""

import json

import pytest
import torch
from peft import LoraConfig, TaskType

from qerl_verl.lora.wire import CONFIG_TENSOR, pack_config, take_config
from qerl_verl.rollout.lora import adapter_scaling


# verl's mooncake casts all that it sends
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_configuration_arrives_as_it_was(dtype, rslora):
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=16, lora_alpha=32, target_modules=["q_proj", "up_proj"], use_rslora=rslora
    )
    tensors = {"a": torch.zeros(2), CONFIG_TENSOR: pack_config(config.to_dict()).to(dtype)}
    found = take_config(tensors)
    assert list(tensors) == ["a"]
    assert found["target_modules"] == ["q_proj", "up_proj"] and found["task_type"] == "CAUSAL_LM"
    assert adapter_scaling(found) == adapter_scaling(config) == (8 if rslora else 2)


def test_any_configuration_is_ascii():
    packed = pack_config({"base_model_name_or_path": "/modèles/ünï"})
    assert packed.dtype == torch.uint8 and packed.max() < 128
    assert json.loads(bytes(packed.tolist()))["base_model_name_or_path"] == "/modèles/ünï"


def test_what_has_no_configuration_is_no_adapter():
    with pytest.raises(ValueError, match="2 tensors without an adapter's configuration; .* takes adapters alone"):
        take_config({"model.norm.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)})
