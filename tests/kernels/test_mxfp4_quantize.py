"""MXFP4 against its definition in the OCP specification, block by block, and its exact place in
NVFP4's container."""

import math

import pytest
import torch

from qerl_verl.kernels.mxfp4_quantize import (
    LARGEST_SPAN,
    MX_BLOCK_SIZE,
    mxfp4_exponents,
    mxfp4_global_scale,
    quantize_mxfp4,
)
from qerl_verl.kernels.nvfp4_dequantize import E2M1_VALUES, dequantize_nvfp4


def specification(block: list[float]) -> list[float]:
    """Returns the block's values after rounding (OCP Microscaling Formats v1.0, section 6.3), one
    at a time, in Python's floats."""
    amax = max(abs(value) for value in block)
    if amax == 0:
        return [0.0] * len(block)
    step = 2.0 ** (math.floor(math.log2(amax)) - 2)
    out = []
    for value in block:
        scaled = min(abs(value) / step, 6.0)
        distance = [abs(scaled - e2m1) for e2m1 in E2M1_VALUES]
        nearest = [i for i, d in enumerate(distance) if d == min(distance)]
        code = next((i for i in nearest if i % 2 == 0), nearest[0])  # ties to even codes
        out.append(math.copysign(E2M1_VALUES[code] * step, value))
    return out


def roundtrip(weight: torch.Tensor) -> torch.Tensor:
    global_scale = mxfp4_global_scale(weight.abs().max())
    packed, scale = quantize_mxfp4(weight, global_scale)
    return dequantize_nvfp4(packed, scale, global_scale, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_is_the_specifications(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(6, 128) * torch.logspace(-3, 0, 6)[:, None]).to(dtype)
    weight[0, :32] = 0
    expected = [specification(block.tolist()) for block in weight.double().reshape(-1, MX_BLOCK_SIZE)]
    assert torch.equal(roundtrip(weight).double().reshape(-1, MX_BLOCK_SIZE), torch.tensor(expected).double())


def test_ties_saturation_and_powers_of_two():
    values = [7.9, -7.0, 6.0, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, 4.0, *[0.0] * 20]
    assert roundtrip(torch.tensor([values]))[0, :12].tolist() == [6, -6, 6, 4, 4, 2, 2, 1, 1, 0, 0, 4]
    for exponent in (-40, -1, 0, 1, 30):
        weight = torch.full((1, 32), 2.0**exponent)
        assert mxfp4_exponents(weight).tolist() == [[exponent - 2]]
        assert torch.equal(roundtrip(weight), weight)


def test_scales_are_powers_of_two_in_equal_pairs():
    torch.manual_seed(0)
    weight = torch.randn(4, 256) * torch.logspace(-2, 0, 4)[:, None]
    global_scale = mxfp4_global_scale(weight.abs().max())
    _, scale = quantize_mxfp4(weight, global_scale)
    scale = scale.float()
    assert torch.equal(scale[:, ::2], scale[:, 1::2]) and scale.max() == 256
    assert (torch.frexp(scale).mantissa == 0.5).all() and torch.frexp(global_scale).mantissa == 0.5
    exponents = torch.log2(scale[:, ::2] / global_scale).int()
    assert torch.equal(exponents, mxfp4_exponents(weight))


def test_the_whole_span_of_e4m3_is_used_and_no_more():
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 0] = 4.0, 4.0 * 2.0**-LARGEST_SPAN
    assert torch.equal(roundtrip(weight), weight)
    weight[1, 0] /= 2
    with pytest.raises(ValueError, match=f"shared exponents from {-LARGEST_SPAN - 1} to 0"):
        roundtrip(weight)


def test_zeros_alone():
    assert torch.equal(roundtrip(torch.zeros(2, 64)), torch.zeros(2, 64))


@pytest.mark.parametrize(
    ("weight", "global_scale", "complaint"),
    [
        (torch.zeros(2, 48), torch.ones(1), "a multiple of 32"),
        (torch.zeros(2, 32, dtype=torch.float64), torch.ones(1), "float32, bfloat16 or float16"),
        (torch.zeros(2, 32), torch.tensor([3.0]), "one power of two"),
        (torch.zeros(2, 32), torch.ones(2), "one power of two"),
    ],
)
def test_what_cannot_be_quantized_is_refused(weight, global_scale, complaint):
    with pytest.raises(ValueError, match=complaint):
        quantize_mxfp4(weight, global_scale)


@pytest.mark.parametrize("amax", [torch.tensor(-1.0), torch.tensor(math.inf), torch.ones(2)])
def test_a_largest_magnitude_that_is_none_is_refused(amax):
    with pytest.raises(ValueError, match="one finite value"):
        mxfp4_global_scale(amax)
