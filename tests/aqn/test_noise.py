"""What is drawn, where it goes, and that it comes off again."""

import subprocess
import sys

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from qerl_verl.aqn.noise import NoiseInjector, draw_noise, find_noise_targets
from qerl_verl.nvfp4.architectures import get_architecture

CONFIG = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    vocab_size=32, architectures=["Qwen3ForCausalLM"],
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**CONFIG)).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def targets_of(model):
    return find_noise_targets(model, get_architecture(model.config), fused={})


def test_distribution():
    z = draw_noise(seed=1, step=7, layer="model.layers.0.input_layernorm", size=200_000, sigma=0.01)
    assert z.dtype == torch.float32 and z.shape == (200_000,)
    assert abs(z.mean().item()) < 4 * 0.01 / 200_000**0.5
    assert z.std().item() == pytest.approx(0.01, rel=0.01)
    assert (z.abs() < 0.01).float().mean().item() == pytest.approx(0.6827, abs=0.005)


def test_depends_on_seed_step_and_layer_and_on_nothing_else():
    base = dict(seed=1, step=7, layer="a", size=64, sigma=0.5)
    first = draw_noise(**base)
    torch.manual_seed(123)
    assert torch.equal(first, draw_noise(**base))
    for change in (dict(seed=2), dict(step=8), dict(layer="b")):
        assert not torch.equal(first, draw_noise(**{**base, **change}))
    assert torch.equal(draw_noise(**{**base, "sigma": 0.25}) * 2, first)


def test_another_process_draws_the_same():
    code = (
        "from qerl_verl.aqn.noise import draw_noise; print(draw_noise(3, 5, 'model.layers.1.input_layernorm', 33, 0.02)"
        ".numpy().tobytes().hex())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == draw_noise(3, 5, "model.layers.1.input_layernorm", 33, 0.02).numpy().tobytes().hex()


def test_goes_to_the_norms_before_qkv_and_gate_up_only(model):
    names = set(targets_of(model))
    assert names == {f"model.layers.{i}.{n}" for i in range(3) for n in ("input_layernorm", "post_attention_layernorm")}


def test_a_norm_that_feeds_something_else_is_an_error(model):
    model.model.layers[1].mlp.gate = model.model.layers[1].mlp.gate_proj
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(ValueError, match="model.layers.1.post_attention_layernorm should feed .*mlp.gate_proj"):
        targets_of(model)


def test_a_model_without_targets_is_an_error(model):
    with pytest.raises(ValueError, match="nothing to put noise on"):
        find_noise_targets(model.lm_head, get_architecture(model.config), fused={})


def test_noise_is_added_to_the_clean_weights_each_time_and_comes_off_bit_for_bit(model):
    clean = {n: p.detach().clone() for n, p in model.named_parameters()}
    injector = NoiseInjector(targets_of(model))
    for step in (1, 2, 3):
        injector.set_noise(seed=9, step=step, sigma=0.1)
        for name, weight in targets_of(model).items():
            expected = clean[f"{name}.weight"].float() + draw_noise(9, step, name, weight.numel(), 0.1)
            assert torch.equal(weight, expected.bfloat16()), (step, name)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in targets_of(model):
            assert torch.equal(parameter, clean[name]), name
    injector.set_noise(seed=9, step=3, sigma=0.0)
    assert all(torch.equal(p, clean[n]) for n, p in model.named_parameters())


def test_one_draw_serves_q_k_and_v_as_row_noise_of_their_weights(model):
    """Eq. 11: noise on the norm is the multiplicative noise (Z / w + 1) on the columns of all three matrices."""
    model = model.double()
    layer, x = model.model.layers[0], torch.randn(5, 64, dtype=torch.float64)
    w = layer.input_layernorm.weight.detach().clone()
    before = layer.input_layernorm(x).detach()
    NoiseInjector(targets_of(model)).set_noise(seed=1, step=1, sigma=0.05)
    z = draw_noise(1, 1, "model.layers.0.input_layernorm", 64, 0.05).double()
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        noised = projection(layer.input_layernorm(x))
        torch.testing.assert_close(noised, before @ (projection.weight * (z / w + 1)).T, rtol=1e-5, atol=1e-6)


def test_a_non_finite_result_is_refused_and_nothing_changes(model):
    before = {n: w.detach().clone() for n, w in targets_of(model).items()}
    injector = NoiseInjector(targets_of(model))
    with pytest.raises(FloatingPointError, match="step 4 makes model.layers.0.input_layernorm.weight non-finite"):
        injector.set_noise(seed=1, step=4, sigma=float("inf"))
    assert all(torch.equal(w, before[n]) for n, w in targets_of(model).items())
