"""Tests what noise is drawn, where it goes, and that it can be removed."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qerl_verl.aqn.noise import (
    Noise,
    NoiseInjector,
    NoiseTarget,
    combine,
    describe_size,
    draw_noise,
    find_noise_targets,
    find_router_norms,
)
from qerl_verl.config.settings import AQNSettings
from qerl_verl.nvfp4.architectures import get_architecture
from tests.helpers.tiny_families import make_config, make_model

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


def targets_and_injector(model):
    """Returns targets whose norms multiply by a float32 parameter, with clean copies in the model's
    dtype.
    """
    norms, targets = targets_of(model), {}
    for name, norm in norms.items():
        clean = norm.weight.detach().clone()
        norm.weight = torch.nn.Parameter(clean.float())
        targets[name] = NoiseTarget(clean=clean, live=norm.weight)
    return targets, NoiseInjector(targets)


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


def test_goes_to_the_norm_in_front_of_router_and_experts():
    """The model has a layer with experts and one without; a router alone is not enough."""
    model = AutoModelForCausalLM.from_config(make_config("Qwen3MoeForCausalLM"))
    names = set(targets_of(model))
    assert names == {f"model.layers.{i}.{n}" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")}
    del model.model.layers[0].mlp.gate
    with pytest.raises(ValueError, match="model.layers.0.post_attention_layernorm should stand beside .*mlp.gate,"):
        targets_of(model)


def test_a_norm_that_feeds_a_router_has_noise_where_it_is_wanted():
    """The measurement covers the norms of the last noise; noise on a router's norm goes with the
    next one.
    """
    model = AutoModelForCausalLM.from_config(make_config("Qwen3MoeForCausalLM"))
    row = get_architecture(model.config)
    names = list(targets_of(model))
    routed = find_router_norms(model, row, names)
    assert routed == {"model.layers.0.post_attention_layernorm"}  # layer 1 has one MLP
    switched = {}
    targets = {
        name: NoiseTarget(torch.ones(512), torch.ones(512), lambda on, name=name: switched.__setitem__(name, on))
        for name in names
    }
    injector = NoiseInjector(targets, routed)
    for router in (True, False):
        injector.set_noise(Noise(seed=1, step=1, sigma=0.1, router=router))
        noised = {name for name, target in targets.items() if not torch.equal(target.live, target.clean)}
        assert noised == {name for name, on in switched.items() if on} == set(names) - (set() if router else routed)
        assert injector.measure()["absolute"] == pytest.approx(0.1, rel=0.1)
    dense = AutoModelForCausalLM.from_config(make_config("Qwen3ForCausalLM"))
    assert not find_router_norms(dense, get_architecture(dense.config), targets_of(dense))


def test_a_norm_that_feeds_something_else_is_an_error(model):
    model.model.layers[1].mlp.gate = model.model.layers[1].mlp.gate_proj
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(ValueError, match="model.layers.1.post_attention_layernorm should stand beside .*mlp.gate_proj"):
        targets_of(model)


def test_a_model_without_targets_is_an_error(model):
    with pytest.raises(ValueError, match="nothing to put noise on"):
        find_noise_targets(model.lm_head, get_architecture(model.config), fused={})


def test_names_are_those_of_transformers_model_whatever_the_engine_calls_its_layers(model):
    """Noise is drawn by name, and vLLM puts the decoder behind a vision tower into a module of its
    own.
    """
    row = get_architecture({"architectures": ["Qwen3VLForConditionalGeneration"]})
    engine = torch.nn.ModuleDict({"language_model": model, "visual": torch.nn.Module()})
    found = find_noise_targets(engine, row, fused={}, prefix="language_model.model.layers.")
    assert {n.replace("language_model.", ""): m for n, m in found.items()} == targets_of(model)
    assert all(name.startswith("model.language_model.layers.") for name in found)


def test_noise_is_added_to_the_clean_weights_each_time_and_comes_off_bit_for_bit(model):
    clean = {n: p.detach().float() for n, p in model.named_parameters()}
    targets, injector = targets_and_injector(model)
    for step in (1, 2, 3):
        injector.set_noise(Noise(seed=9, step=step, sigma=0.1))
        for name, target in targets.items():
            expected = clean[f"{name}.weight"] + draw_noise(9, step, name, target.live.numel(), 0.1)
            assert torch.equal(target.live, expected), (step, name)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in targets:
            assert torch.equal(parameter, clean[name]), name
    injector.set_noise(Noise(seed=9, step=3, sigma=0.0))
    assert all(torch.equal(p, clean[n]) for n, p in model.named_parameters())


def test_one_draw_serves_q_k_and_v_as_row_noise_of_their_weights(model):
    """Noise on the norm is the multiplicative noise (Z / w + 1) on the columns of all three
    matrices (Eq. 11).
    """
    model = model.double()
    layer, x = model.model.layers[0], torch.randn(5, 64, dtype=torch.float64)
    w = layer.input_layernorm.weight.detach().clone()
    before = layer.input_layernorm(x).detach()
    targets_and_injector(model)[1].set_noise(Noise(seed=1, step=1, sigma=0.05))
    z = draw_noise(1, 1, "model.layers.0.input_layernorm", 64, 0.05).double()
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        noised = projection(layer.input_layernorm(x).double())
        torch.testing.assert_close(noised, before @ (projection.weight * (z / w + 1)).T, rtol=1e-5, atol=1e-6)


def test_a_non_finite_result_is_refused_and_nothing_changes(model):
    targets, injector = targets_and_injector(model)
    with pytest.raises(FloatingPointError, match="step 4 makes model.layers.0.input_layernorm.weight non-finite"):
        injector.set_noise(Noise(seed=1, step=4, sigma=float("inf")))
    assert all(torch.equal(t.live, t.clean.float()) for t in targets.values())


def test_a_weight_that_would_round_the_noise_off_is_refused():
    weight = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float32 weight to act on, got torch.bfloat16"):
        NoiseTarget(clean=weight, live=weight)


def make_targets(*sizes, hidden=2**16):
    cleans = [torch.full((hidden,), size, dtype=torch.bfloat16) for size in sizes]
    return {f"norm{i}": NoiseTarget(clean=c, live=c.float()) for i, c in enumerate(cleans)}


def test_relative_noise_is_in_units_of_each_norms_own_weight():
    targets = make_targets(0.25, 4.0)
    injector = NoiseInjector(targets)
    injector.set_noise(Noise(seed=3, step=2, sigma=0.01, unit="relative"))
    for name, size in (("norm0", 0.25), ("norm1", 4.0)):
        z = targets[name].live - size
        torch.testing.assert_close(z, draw_noise(3, 2, name, z.numel(), 0.01 * size), rtol=0, atol=2**-21)
    found = injector.measure()
    assert found["relative"] == pytest.approx(0.01, rel=0.01)
    assert found["absolute"] == pytest.approx(0.01 * ((0.25**2 + 4**2) / 2) ** 0.5, rel=0.01)


def test_what_acts_is_read_from_the_live_weights():
    targets = make_targets(0.25, 1.0, 4.0)
    injector = NoiseInjector(targets)
    assert injector.measure() == {
        "absolute": 0.0, "relative": 0.0, "weight_min": 0.25, "weight_median": 1.0, "weight_max": 4.0,
    }  # fmt: skip
    injector.set_noise(Noise(seed=3, step=2, sigma=0.01))
    assert injector.measure()["absolute"] == pytest.approx(0.01, rel=0.01)
    for target in targets.values():
        target.live.copy_(target.live.bfloat16())  # a 16-bit weight
    assert injector.measure()["absolute"] != pytest.approx(0.01, rel=0.01)


def test_rounding_to_the_weights_dtype_takes_small_noise_off():
    targets = make_targets(1.5, 3.0)
    injector = NoiseInjector(targets)
    injector.set_noise(Noise(seed=3, step=2, sigma=5e-4, rounding="weight"))
    for target in targets.values():
        assert torch.equal(target.live, target.live.bfloat16().float())
    assert injector.measure()["absolute"] < 5e-5
    injector.set_noise(Noise(seed=3, step=2, sigma=5e-4))
    assert injector.measure()["absolute"] == pytest.approx(5e-4, rel=0.01)


def test_the_norm_is_told_whether_it_is_noised():
    told, weight = [], torch.ones(8)
    injector = NoiseInjector({"norm": NoiseTarget(clean=weight, live=weight.clone(), switch=told.append)})
    for sigma in (0.1, 0.0):
        injector.set_noise(Noise(seed=1, step=1, sigma=sigma))
    assert told == [True, False]


MEASURED = {"absolute": 0.01, "relative": 0.04, "weight_min": 0.1, "weight_median": 0.25, "weight_max": 2.0}


def test_several_workers_are_one():
    other = {"absolute": 0.02, "relative": 0.03, "weight_min": 0.2, "weight_median": 0.35, "weight_max": 3.0}
    assert combine([MEASURED, MEASURED]) == pytest.approx(MEASURED)
    expected = {"absolute": (2.5e-4) ** 0.5, "relative": (1.25e-3) ** 0.5}
    assert combine([MEASURED, other]) == pytest.approx(
        expected | {"weight_min": 0.1, "weight_median": 0.3, "weight_max": 3.0}
    )


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("absolute", "sigma is 0.01 first (4 % of the median norm's) and 0.0005 last (0.2 % of the median norm's)"),
        ("relative", "sigma is 1 % first (0.0025 on the median norm) and 0.05 % last (0.00013 on the median norm)"),
    ],
)
def test_how_large_the_noise_is_on_a_model_is_told_in_both_units(unit, expected):
    line = describe_size({"first": 0.01, "last": 0.0005}, unit, MEASURED)
    assert line == f"the root mean square of a noised norm's weight is 0.25 (median; 0.1 to 2); {expected}"


def test_rounding_is_that_of_the_stored_weight():
    """A 16-bit norm that multiplies by 1 + weight rounds the weight, and not the sum."""
    clean = torch.full((64,), 0.01, dtype=torch.bfloat16)
    target = NoiseTarget(clean=clean, live=clean.float() + 1.0, offset=1.0)
    NoiseInjector({"norm": target}).set_noise(Noise(seed=1, step=1, sigma=1e-3, rounding="weight"))
    noised = (clean.float() + draw_noise(1, 1, "norm", 64, 1e-3)).bfloat16().float()
    torch.testing.assert_close(target.live - 1.0, noised, rtol=0, atol=2**-23)


def test_the_noise_of_a_step_follows_the_settings():
    settings = AQNSettings(seed=7, unit="relative", rounding="weight", router=True)
    assert Noise.of(settings, 3, 0.1) == Noise(7, 3, 0.1, "relative", "weight", True)
    assert Noise.of(AQNSettings(), 1, 0.0) == Noise(42, 1, 0.0)


def test_the_norm_in_front_of_a_delta_net_stands_beside_its_linears():
    """vLLM fuses them in pairs (vllm/model_executor/models/qwen3_5.py, packed_modules_mapping)."""
    config, model = make_model("Qwen3_5ForCausalLM")
    row = get_architecture(config)
    expected = {f"model.layers.{i}.{norm}" for i in range(2) for norm in row.noise_targets}
    assert set(find_noise_targets(model, row, fused={})) == expected
    assert row.noise_targets_of(config, 0)["input_layernorm"] == tuple(
        f"linear_attn.in_proj_{name}" for name in ("qkv", "z", "b", "a")
    )
    net = model.model.layers[0].linear_attn
    fused = {}
    for name, parts in (("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")), ("in_proj_ba", ("in_proj_b", "in_proj_a"))):
        setattr(net, name, torch.nn.Identity())
        for part in parts:
            delattr(net, part)
            fused[f"linear_attn.{part}"] = f"linear_attn.{name}"
    assert set(find_noise_targets(model, row, fused)) == expected
    del net.in_proj_ba
    with pytest.raises(ValueError, match=r"layers.0.input_layernorm should stand beside .*linear_attn.in_proj_b"):
        find_noise_targets(model, row, fused)
