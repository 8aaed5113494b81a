"""Tests the norm that takes noise, one layer at a time: what it computes, and that it has vLLM's
bits without noise.
"""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from qerl_verl.aqn.noise import Noise, NoiseInjector, draw_noise
from qerl_verl.aqn.schedule import AQNSchedule
from qerl_verl.config.settings import AQNSettings
from qerl_verl.platform.compilers import missing_compiler
from qerl_verl.rollout import norm as norm_module
from qerl_verl.rollout.norm import REPLACED, NoisyNorm, NoisyRMSNorm, register_norm

HIDDEN = 8192


@pytest.fixture(autouse=True)
def registered():
    """Registers the norm as vLLM's plugin does, and restores vLLM's own for other tests in this
    process.
    """
    names = [stock.__name__ for stock in REPLACED]
    before = {name: op_registry_oot.pop(name) for name in names if name in op_registry_oot}
    register_norm()
    yield
    for name in names:
        op_registry_oot.pop(name)
    op_registry_oot.update(before)


def build(weight, noise=True, stock=RMSNorm, **arguments):
    """Builds a norm as vLLM's models do, and loads its weight."""
    config = VllmConfig(additional_config={"qerl": {"noise": noise}})
    before = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)  # as vLLM's loader does
    try:
        with set_current_vllm_config(config):
            norm = stock(weight.numel(), **arguments)
    finally:
        torch.set_default_dtype(before)
    assert norm.weight.dtype == weight.dtype and type(norm) is REPLACED[stock]
    norm.weight.data.copy_(weight)
    if hasattr(norm, "quant_method"):
        norm.quant_method.process_weights_after_loading(norm)
    return norm


def injector(norm, name="model.layers.0.input_layernorm"):
    return NoiseInjector({name: norm.noise_target()})


def effective_weight(norm, rows=4096, seed=0):
    """Returns the least-squares slope of the norm's output on its normalized input, by channel,
    from two halves of the rows: ``[2, hidden]``.
    """
    generator, halves = torch.Generator().manual_seed(seed), []
    for _ in range(2):
        numerator, denominator = torch.zeros(2, norm.hidden_size, dtype=torch.float64)
        for _ in range(rows // 512):
            x = torch.randn(256, norm.hidden_size, generator=generator).to(norm.weight.dtype)
            unit = x.float() * (x.float().square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
            numerator += (norm(x.clone()).float() * unit).sum(0)
            denominator += unit.square().sum(0)
        halves.append(numerator / denominator)
    return torch.stack(halves)


def acting_noise(norm, noise, **arguments):
    """Returns standard deviation and mean of the effective weight's change, and the mean's standard
    error.

    Rounding the outputs adds an independent error to each half, which their covariance excludes.
    """
    noise.set_noise(Noise(**arguments | {"sigma": 0.0}))
    clean = effective_weight(norm)
    noise.set_noise(Noise(**arguments))
    first, second = effective_weight(norm) - clean
    both = (first + second) / 2
    variance = ((first - first.mean()) * (second - second.mean())).mean().item()
    return max(variance, 0.0) ** 0.5, both.mean().item(), both.std().item() / len(both) ** 0.5


@pytest.mark.parametrize("stock", REPLACED, ids=lambda stock: stock.__name__)
def test_every_norm_of_vllms_takes_noise_on_what_it_multiplies_by(stock):
    """Gemma's norms multiply by 1 + weight. Without noise the bits are vLLM's; with noise the
    result is the formula's, rounded once.
    """
    generator = torch.Generator().manual_seed(4)
    clean = (0.3 * torch.randn(512, generator=generator)).bfloat16()
    norm, plain = build(clean, stock=stock), build(clean, noise=False, stock=stock)
    assert plain.qerl_weight is None and plain.qerl_offset == norm.qerl_offset == float("Gemma" in stock.__name__)
    x, residual = ((2 * torch.randn(16, 512, generator=generator)).bfloat16() for _ in range(2))

    def outputs(module):
        return torch.cat([module(x.clone()), *module(x.clone(), residual.clone())])

    live = clean.float() + norm.qerl_offset
    # what a compiled or captured norm multiplies by from the start
    assert torch.equal(norm.qerl_weight, live)
    noise = injector(norm)
    for _ in range(2):
        assert torch.equal(outputs(norm), outputs(plain))
        noise.set_noise(Noise(seed=1, step=1, sigma=0.1))
        effective = clean.double() + norm.qerl_offset + draw_noise(1, 1, next(iter(noise.targets)), 512, 0.1).double()
        expected = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * effective
        # a rounding to bfloat16
        torch.testing.assert_close(norm(x.clone()).double(), expected, rtol=2**-8, atol=0)
        assert noise.measure()["absolute"] == pytest.approx(0.1, rel=0.1)
        noise.set_noise(Noise(seed=1, step=1, sigma=0.0))
    noise.set_noise(Noise(seed=1, step=1, sigma=0.1))
    norm.qerl_reset()  # after the base was read from disk again
    assert torch.equal(outputs(norm), outputs(plain)) and torch.equal(norm.qerl_weight, live)


def test_every_norm_that_vllm_derives_is_replaced():
    """A new class of vLLM, for example for models that run through transformers' code, would get no
    noise.
    """
    stock = {RMSNorm, GemmaRMSNorm}
    from vllm.model_executor.models.transformers import fusers  # noqa: F401

    while new := {sub for cls in stock for sub in cls.__subclasses__() if not issubclass(sub, NoisyNorm)} - stock:
        stock |= new
    assert stock == set(REPLACED)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.bfloat16, 1.0),
        (torch.float16, 16.0),
        pytest.param(torch.bfloat16, 0.05, marks=SLOW),
        pytest.param(torch.bfloat16, 4.0, marks=SLOW),
        pytest.param(torch.bfloat16, 16.0, marks=SLOW),
        pytest.param(torch.float16, 0.05, marks=SLOW),
        pytest.param(torch.float16, 1.0, marks=SLOW),
        pytest.param(torch.float16, 4.0, marks=SLOW),
    ],
)
def test_the_noise_that_acts_is_the_noise_that_was_drawn(dtype, size):
    """Uses the smallest sigma of the default schedule, which is lost in a bfloat16 weight of 1 or
    more.
    """
    clean = (size * (0.75 + 0.5 * torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)))).to(dtype)
    norm = build(clean)
    # the clean norm by the noised one's formula: the noise is all that changes
    norm.qerl_captured = True
    std, mean, error = acting_noise(norm, injector(norm), seed=42, step=9, sigma=5e-4)
    assert std == pytest.approx(5e-4, rel=0.02)
    assert abs(mean) < 3 * error


def test_every_stage_of_the_default_schedule_is_what_the_live_weight_holds():
    hidden = 2**17
    clean = torch.logspace(-1.3, 1.2, hidden).bfloat16()
    norm, schedule = build(clean), AQNSchedule(AQNSettings(), total_steps=10)
    noise = injector(norm)
    for step in range(1, 11):
        sigma = schedule.sigma(step)
        noise.set_noise(Noise(seed=42, step=step, sigma=sigma))
        assert noise.measure()["absolute"] == pytest.approx(sigma, rel=0.02)
        z = norm.qerl_weight - clean.float()
        assert abs(z.mean()) <= 3 * sigma / hidden**0.5
        expected = draw_noise(42, step, "model.layers.0.input_layernorm", hidden, sigma)
        torch.testing.assert_close(z, expected, rtol=0, atol=16 * 2**-23)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_noise_the_bits_are_vllms(dtype):
    generator = torch.Generator().manual_seed(2)
    clean = (torch.randn(1536, generator=generator).exp() * 0.5).to(dtype)
    norm, stock = build(clean, eps=1e-5), build(clean, noise=False, eps=1e-5)
    assert stock.qerl_weight is None and not hasattr(stock, "quant_method")
    noise = injector(norm)
    x, residual = ((3 * torch.randn(64, 1536, generator=generator)).to(dtype) for _ in range(2))
    for _ in range(2):
        assert torch.equal(norm(x.clone()), stock(x.clone()))
        both = zip(norm(x.clone(), residual.clone()), stock(x.clone(), residual.clone()), strict=True)
        assert all(torch.equal(a, b) for a, b in both)
        noise.set_noise(Noise(seed=1, step=1, sigma=0.1))
        assert not torch.equal(norm(x.clone()), stock(x.clone()))
        assert torch.equal(norm.weight, clean)
        noise.set_noise(Noise(seed=1, step=1, sigma=0.0))


@SLOW
@pytest.mark.skipif(missing_compiler("cpu") is not None, reason="needs a C++ compiler")
@pytest.mark.parametrize("stock", REPLACED, ids=lambda stock: stock.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_noise_the_bits_are_vllms_under_torchinductor_too(dtype, stock):
    import vllm.ir.op as ir

    generator = torch.Generator().manual_seed(3)
    clean = (torch.randn(512, generator=generator).exp() * 0.5).to(dtype)
    x, residual = (torch.randn(32, 512, generator=generator).to(dtype) for _ in range(2))
    results = []
    # TorchInductor sees the operations, as after vLLM's lowering pass
    with ir.enable_torch_wrap(False):
        for noise in (True, False):
            norm = build(clean, noise=noise, stock=stock)
            torch._dynamo.reset()
            compiled = torch.compile(norm.forward_native, fullgraph=True)
            results.append((compiled(x.clone()), *compiled(x.clone(), residual.clone())))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("batch_invariant", ["0", "1"])
def test_on_a_gpu_vllms_batch_invariant_kernel_gets_the_float32_weight(monkeypatch, batch_invariant):
    """The Triton kernel is replaced by a stand-in; a clean norm uses vLLM's own code."""
    import vllm.model_executor.layers.layernorm as theirs

    seen = []

    def kernel(x, weight, eps, residual=None):
        seen.append((weight.dtype, residual is not None))
        unit = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        y = (unit * weight).to(x.dtype)
        return y if residual is None else (y, residual)

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", batch_invariant)
    for module in (norm_module, theirs):
        monkeypatch.setattr(module, "rms_norm_batch_invariant", kernel)
    clean = (torch.rand(256, generator=torch.Generator().manual_seed(5)) + 0.5).bfloat16()
    norm = build(clean)
    x, residual = torch.randn(2, 8, 256, generator=torch.Generator().manual_seed(6)).bfloat16()
    norm.forward_cuda(x.clone()), norm.forward_cuda(x.clone(), residual.clone())
    stock = [(torch.bfloat16, False), (torch.bfloat16, True)]
    assert seen == (stock if batch_invariant == "1" else [])
    seen.clear()
    injector(norm).set_noise(Noise(seed=1, step=1, sigma=0.1))
    assert torch.equal(norm.forward_cuda(x), norm.forward_native(x.clone()))
    y, total = norm.forward_cuda(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm.forward_native(total.clone()))
    assert seen == [(torch.float32, False)] * 2


def test_norms_of_another_width_than_the_models_are_left_to_vllm():
    """These are the q and k norms of Qwen3, which vLLM fuses with the rotary embedding."""
    norm = build(torch.ones(64, dtype=torch.bfloat16))
    assert norm.qerl_weight is not None
    config = VllmConfig(additional_config={"qerl": {"noise": True}})
    config.model_config = type("Model", (), {"get_hidden_size": lambda self: 128})()
    with set_current_vllm_config(config):
        assert not hasattr(RMSNorm(64), "quant_method") and hasattr(RMSNorm(128), "quant_method")
        assert not hasattr(RMSNorm(128, has_weight=False), "quant_method")


def test_vllm_builds_ours_under_its_own_name_and_another_plugins_norm_is_refused(monkeypatch):
    assert type(build(torch.ones(8), noise=False)) is NoisyRMSNorm
    # what compilation_config.custom_ops goes by
    assert NoisyRMSNorm.name == RMSNorm.name == "rms_norm"
    register_norm()  # twice is once
    monkeypatch.setitem(op_registry_oot, "RMSNorm", dict)
    with pytest.raises(RuntimeError, match="builtins.dict has replaced vLLM's RMSNorm.*VLLM_PLUGINS"):
        register_norm()


@pytest.mark.parametrize(
    ("additional", "wanted"),
    [
        (None, False),
        ({}, False),
        ({"qerl": {}}, False),
        ({"qerl": {"noise": False}}, False),
        ({"qerl": {"noise": True}}, True),
    ],
)
def test_an_engine_asks_for_noise_in_its_additional_config(additional, wanted):
    assert norm_module.wants_noise(additional) is wanted
