"""Tests which tensors of a worker each probe looks at."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qerl_verl.rollout.probes import adapter_digest, base_digest, norm_weights


@pytest.fixture
def worker():
    """Returns a worker with one layer that has a weight, an adapter of vLLM's and one in the
    layer."""
    layer = nn.Module()
    layer.weight_packed = nn.Parameter(torch.arange(8, dtype=torch.uint8), requires_grad=False)
    layer.lora_a_stacked = nn.Parameter(torch.ones(2))
    layer.register_buffer("qerl_lora_a", torch.ones(2, 3, dtype=torch.bfloat16))
    layer.register_buffer("alpha", torch.ones(1))
    model = nn.ModuleDict({"layer": layer})
    targets = {"model.layers.0.input_layernorm": SimpleNamespace(live=torch.tensor([1.0, 1.5]))}
    return SimpleNamespace(
        layer=layer,
        model_runner=SimpleNamespace(get_model=lambda: model),
        _qerl_noise_injector=lambda: SimpleNamespace(targets=targets),
    )


@pytest.mark.parametrize(
    ("tensor", "changes_base", "changes_adapter"),
    [
        ("weight_packed", True, False),
        ("lora_a_stacked", False, False),
        ("qerl_lora_a", False, True),
        ("alpha", False, False),
    ],
)
def test_a_digest_covers_its_own_tensors_alone(worker, tensor, changes_base, changes_adapter):
    before = base_digest(worker), adapter_digest(worker)
    getattr(worker.layer, tensor).data.flatten()[0] = 7
    assert (base_digest(worker) != before[0], adapter_digest(worker) != before[1]) == (changes_base, changes_adapter)


def test_live_weights_of_norms_are_named_as_in_transformers(worker):
    assert norm_weights(worker) == {"model.layers.0.input_layernorm": [1.0, 1.5]}
