"""nvfp4_linear against the same mathematics in float64."""

import pytest
import torch

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear
from qerl_verl.kernels.nvfp4_quantize import quantize_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight

N, K = 48, 160
UNIT_ROUNDOFF = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24, torch.float64: 2**-53}


def problem(dtype, leading=(7,), bias=True):
    torch.manual_seed(0)
    weight = torch.randn(N, K) * 0.05
    global_scale = torch.tensor(
        [11213.7]
    )  # its reciprocal needs all bits, so that rounding the scaled weight would show
    packed, scale = quantize_nvfp4(weight, global_scale)
    x = torch.randn(*leading, K).to(dtype).requires_grad_()
    b = torch.randn(N).to(dtype).requires_grad_() if bias else None
    exact = dequantize_nvfp4(packed, scale, global_scale.double(), torch.float64)
    return x, PackedWeight(packed, scale, global_scale.item()), b, exact


def assert_rounded_once(got, want, magnitude, dtype, terms):
    """Allows one rounding to ``dtype``, plus the error of summing ``terms`` products of total
    ``magnitude`` in float32."""
    accumulated = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32] * (terms + 4)
    bound = 1.01 * UNIT_ROUNDOFF[dtype] * want.abs() + accumulated * magnitude
    assert got.dtype == dtype and got.shape == want.shape
    assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(7,), (1,), (2, 3), (2, 3, 4), ()])
@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF))
def test_output_and_gradients(dtype, leading, bias):
    x, weight, b, exact = problem(dtype, leading, bias)
    y = nvfp4_linear(x, weight, b)
    x64 = x.detach().double()
    b64 = b.detach().double() if bias else torch.zeros(N, dtype=torch.float64)
    assert_rounded_once(y.detach(), x64 @ exact.T + b64, x64.abs() @ exact.T.abs() + b64.abs(), dtype, K)

    grad = torch.randn_like(y)
    y.backward(grad)
    g64 = grad.double()
    assert_rounded_once(x.grad, g64 @ exact, g64.abs() @ exact.abs(), dtype, N)
    if bias:
        rows = g64.reshape(-1, N)
        assert_rounded_once(b.grad, rows.sum(0), rows.abs().sum(0), dtype, len(rows))


def test_gradcheck():
    x, weight, b, _ = problem(torch.float64, (2,))
    x, b = x.detach()[:, :32].requires_grad_(), b.detach()[:8].requires_grad_()
    weight = PackedWeight(weight.packed[:8, :16], weight.scale[:8, :2], weight.global_scale)
    assert torch.autograd.gradcheck(lambda x, b: nvfp4_linear(x, weight, b), (x, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nothing_but_the_packed_bytes_is_saved_for_backward(dtype):
    x, weight, b, _ = problem(dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = nvfp4_linear(x, weight, b)
    assert {(t.data_ptr(), t.dtype) for t in saved} == {(t.data_ptr(), t.dtype) for t in (weight.packed, weight.scale)}
    y.sum().backward()
    assert x.grad is not None


def test_no_gradient_that_nobody_wants():
    x, weight, b, _ = problem(torch.float32)
    nvfp4_linear(x.detach(), weight, b).sum().backward()
    assert x.grad is None and torch.equal(b.grad, torch.full((N,), 7.0))
    assert not nvfp4_linear(x.detach(), weight, b.detach()).requires_grad


def test_the_output_may_be_changed_in_place():
    """Model code does that to the output of an nn.Linear, too."""
    x, weight, b, _ = problem(torch.float32, (2, 3))
    y = nvfp4_linear(x, weight, b)
    y += x.mean()
    y.sum().backward()
    assert x.grad is not None


def test_input_and_gradient_need_not_be_contiguous():
    x, weight, b, _ = problem(torch.float32, (6, 4))
    want = nvfp4_linear(x, weight, b)
    want.sum().backward()
    other = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not other.is_contiguous()
    got = nvfp4_linear(other, weight, b)
    got.sum().backward()  # the gradient of a sum is an expanded, stride-0 tensor
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(other.grad, x.grad)


def test_scale_may_come_as_bytes():
    x, weight, b, _ = problem(torch.bfloat16)
    assert torch.equal(
        nvfp4_linear(x, weight._replace(scale=weight.scale.view(torch.uint8)), b), nvfp4_linear(x, weight, b)
    )


def test_bias_of_another_dtype_and_its_gradient():
    """A float32 bias beside 16-bit activations, as in mixed precision: autograd returns the
    gradient in float32."""
    x, weight, _, _ = problem(torch.bfloat16)
    b = torch.randn(N, requires_grad=True)
    y = nvfp4_linear(x, weight, b)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and b.grad.dtype == torch.float32
