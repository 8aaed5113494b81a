"""What FP8 compute is defined as: rounding of activations and weights."""

import pytest
import torch

from qerl_verl.kernels import portable
from qerl_verl.kernels.mxfp4_quantize import mxfp4_global_scale, quantize_mxfp4
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_fp8_linear import (
    nvfp4_fp8_linear_reference,
    nvfp4_to_fp8_reference,
    quantize_rows_reference,
    row_scales,
    through_fp8,
)

N, K, ALPHA = 48, 128, 1 / 640


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def weight():
    return torch.randint(0, 256, (N, K // 2), dtype=torch.uint8), torch.randint(1, 127, (N, K // 16), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (448.0, 1.0),
        (448.00003, 2.0),
        (256.0, 1.0),
        (224.0, 0.5),
        (1.0, 2.0**-8),
        (1.75, 2.0**-8),
        (1.7500001, 2.0**-7),
        (0.0, 2.0**-126),
        (1e-44, 2.0**-126),
        (3.4e38, 2.0**120),
        (2.0**127, 2.0**119),
        (float("inf"), float("nan")),
    ],
)
def test_the_smallest_power_of_two_that_keeps_a_row_within_448(amax, scale):
    got = row_scales(torch.tensor([amax]))
    assert torch.equal(got, torch.tensor([scale])) or (got.isnan().all() and scale != scale)
    assert scale != scale or amax / got.item() <= 448
    assert torch.isfinite(got.reciprocal()).all() or scale != scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_are_rounded_to_four_significant_bits(dtype):
    x = torch.randn(64, 512).to(dtype)
    got = through_fp8(*quantize_rows_reference(x), torch.float64)
    large = x.abs() >= x.abs().amax(1, keepdim=True) * 2.0**-14
    assert ((got - x.double()).abs() <= x.double().abs() * 2**-4)[large].all()
    assert ((got - x.double()).abs() <= 2.0**-9 * x.double().abs().amax(1, keepdim=True) / 224).logical_or(large).all()
    mantissa, _ = torch.frexp(got[large])
    assert torch.equal(mantissa * 16, (mantissa * 16).round())


def test_the_rounding_of_a_value_does_not_depend_on_its_row_nor_on_where_it_is_divided():
    x = torch.randn(8, 256).bfloat16()
    whole = through_fp8(*quantize_rows_reference(x), torch.bfloat16)
    halves = [through_fp8(*quantize_rows_reference(part), torch.bfloat16) for part in x.chunk(2, 1)]
    near = x.abs() >= x.abs().amax(1, keepdim=True) * 2.0**-13
    assert torch.equal(whole[near], torch.cat(halves, 1)[near])


def test_rounded_activations_and_weights_are_exact_in_bfloat16(weight):
    for codes in (quantize_rows_reference(torch.randn(8, 256) * 1e-3), nvfp4_to_fp8_reference(*weight)):
        assert torch.equal(through_fp8(*codes, torch.bfloat16).double(), through_fp8(*codes, torch.float64))


def test_a_weight_moves_by_at_most_a_sixteenth_and_only_where_e4m3_does_not_hold_the_product():
    scale = torch.arange(0x38, 0x7F, dtype=torch.uint8)[:, None]  # 1 to 448, one block in a row
    packed = torch.arange(16, dtype=torch.uint8).view(8, 2)
    packed = (packed[:, 0] | packed[:, 1] << 4).expand(len(scale), 8)
    exact = block_values_nvfp4(packed, scale, torch.float64)
    got = through_fp8(*nvfp4_to_fp8_reference(packed, scale), torch.float64)
    moved = got != exact
    assert ((got - exact).abs() <= exact.abs() / 16).all()
    code = torch.arange(16) & 7
    assert not moved[:, (code == 1) | (code == 2) | (code == 4) | (code == 6)].any()
    assert not moved[(scale.flatten() & 7 == 0) | (scale.flatten() & 7 == 2) | (scale.flatten() & 7 == 4)].any()
    assert moved.any()


def test_an_mxfp4_weight_is_exact_in_fp8():
    w = torch.randn(32, 256) * torch.randn(32, 1).exp()
    packed, scale = quantize_mxfp4(w, mxfp4_global_scale(w.abs().max()))
    got = through_fp8(*nvfp4_to_fp8_reference(packed, scale), torch.float64)
    assert torch.equal(got, block_values_nvfp4(packed, scale, torch.float64))


@pytest.mark.parametrize("bias", [False, True])
def test_the_reference_in_bfloat16_is_the_definition_rounded_once(weight, bias):
    x, b = torch.randn(2, 3, K).bfloat16(), torch.randn(N).bfloat16() if bias else None
    codes = nvfp4_to_fp8_reference(*weight)
    exact = nvfp4_fp8_linear_reference(x.double(), *codes, ALPHA, b)
    x_rounded = through_fp8(*quantize_rows_reference(x.view(-1, K)), torch.float64)
    by_hand = x_rounded @ through_fp8(*codes, torch.float64).t() * ALPHA + (0 if b is None else b.double())
    torch.testing.assert_close(exact, by_hand.view(2, 3, N))
    got = nvfp4_fp8_linear_reference(x, *codes, ALPHA, b)
    sums = (x_rounded.abs() @ through_fp8(*codes, torch.float64).abs().t() * ALPHA).view(2, 3, N)
    bound = 2.0**-8 * exact.abs() + K * 2.0**-23 * sums
    assert got.dtype == torch.bfloat16 and ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("n", "k", "dtype", "reason"),
    [
        (48, 128, torch.bfloat16, None),
        (48, 128, torch.float16, "activations have to be bfloat16, got torch.float16"),
        (40, 128, torch.bfloat16, "N and K have to be multiples of 16, got 40 x 128"),
    ],
)
def test_what_fp8_tensor_cores_do_not_serve(n, k, dtype, reason):
    assert portable.check_fp8(n, k, dtype) == reason


@pytest.mark.parametrize(
    ("capability", "trial", "reason"),
    [
        ((8, 0), None, "FP8 needs compute capability 8.9 (Ada) or later, this device is NVIDIA A100 (8.0)"),
        ((8, 9), "no kernel image", "PyTorch multiplies no FP8 with scales by row here: no kernel image"),
        ((9, 0), None, None),
    ],
)
def test_a_gpu_without_fp8_says_so(monkeypatch, capability, trial, reason):
    def scaled_mm(*args, **kwargs):
        if trial:
            raise RuntimeError(trial)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(portable, "trial", lambda device: None)
    monkeypatch.setattr(torch, "zeros", lambda *a, real=torch.zeros, **k: real(*a, **k | {"device": "cpu"}))
    monkeypatch.setattr(torch, "ones", lambda *a, real=torch.ones, **k: real(*a, **k | {"device": "cpu"}))
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    portable._fp8_trial.cache_clear()
    assert portable.fp8_availability(0) == reason
    portable._fp8_trial.cache_clear()
