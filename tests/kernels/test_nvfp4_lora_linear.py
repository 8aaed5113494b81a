"""The LoRA delta and the fused training layer against autograd on the dequantized weight."""

import pytest
import torch

from qerl_verl.kernels.backends import Backend, get_backend
from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference, nvfp4_lora_linear
from qerl_verl.kernels.nvfp4_quantize import quantize_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight

N, K, RANK, SCALING = 48, 160, 4, 2.5
PYTORCH = get_backend("pytorch")


class Decoding(Backend):
    """Like a kernel that decodes the weight inside the GEMM: there is none in 16 bits
    to add with."""

    def decodes_first(self, tokens, n, k):
        return False

    def add_linear(self, *args):
        pytest.fail("asked for a GEMM with a temporary weight")


@pytest.mark.parametrize("widths", [(48,), (32, 8, 8), (20, 28), (1, 2, 3, 4)])
@pytest.mark.parametrize("leading", [(7,), (1,), (2, 3), ()])
def test_each_fused_projection_gets_its_own_a_and_b(widths, leading):
    torch.manual_seed(0)
    x = torch.randn(*leading, K, dtype=torch.float64)
    a = [torch.randn(RANK, K, dtype=torch.float64) for _ in widths]
    b = [torch.randn(width, RANK, dtype=torch.float64) for width in widths]
    y = torch.randn(*leading, sum(widths), dtype=torch.float64)
    expected = y + torch.cat([SCALING * x @ p.t() @ q.t() for p, q in zip(a, b, strict=True)], dim=-1)
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    got = add_lora_reference(y, x, torch.cat(a), torch.cat(b), ends, SCALING)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert got is y


def problem(dtype, leading=(7,), bias=True, master=None):
    torch.manual_seed(0)
    global_scale = torch.tensor([11213.7])
    packed, scale = quantize_nvfp4(torch.randn(N, K) * 0.05, global_scale)
    x = torch.randn(*leading, K).to(dtype).requires_grad_()
    b = torch.randn(N).to(dtype).requires_grad_() if bias else None
    lora_a = (torch.randn(RANK, K) * 0.1).to(master or dtype).requires_grad_()
    lora_b = (torch.randn(N, RANK) * 0.1).to(master or dtype).requires_grad_()
    weight = dequantize_nvfp4(packed, scale, global_scale.double(), torch.float64)
    packed_weight = PackedWeight(packed, scale.view(torch.uint8), global_scale.item())
    return (x, packed_weight, b, lora_a, lora_b, SCALING, PYTORCH), weight


def reference(arguments, weight, upstream):
    """Returns output and gradients of x, bias, A and B in float64, with A and B rounded to x's
    dtype as the layer does."""
    x, _, bias, a, b, scaling, _ = arguments
    cast = [t.detach().to(x.dtype).double().requires_grad_() for t in (x, a, b)]
    bias = None if bias is None else bias.detach().double().requires_grad_()
    x, a, b = cast
    y = torch.nn.functional.linear(x, weight, bias) + scaling * (x @ a.t()) @ b.t()
    wanted = [x, *([] if bias is None else [bias]), a, b]
    return y, torch.autograd.grad(y, wanted, upstream.double())


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", [PYTORCH, Decoding()], ids=["decodes first", "decodes inside"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(7,), (2, 3), ()])
@pytest.mark.parametrize(
    ("dtype", "master", "tolerance"),
    [
        (torch.float64, None, 1e-13),
        (torch.float32, None, 2e-6),
        (torch.bfloat16, None, 6e-3),
        (torch.bfloat16, torch.float32, 6e-3),
    ],
)
def test_output_and_every_gradient(dtype, master, tolerance, leading, bias, backend):
    arguments, weight = problem(dtype, leading, bias, master)
    arguments = (*arguments[:-1], backend)
    leaves = [t for i, t in enumerate(arguments[:5]) if i != 1 and t is not None]
    y = nvfp4_lora_linear(*arguments)
    upstream = torch.randn_like(y)
    expected, expected_grads = reference(arguments, weight, upstream)
    assert y.dtype == dtype and y.shape == (*leading, N) and error(y, expected) < tolerance
    for leaf, got, want in zip(leaves, torch.autograd.grad(y, leaves, upstream), expected_grads, strict=True):
        assert got.dtype == leaf.dtype and got.shape == leaf.shape and error(got, want) < tolerance


def test_gradcheck():
    (x, weight, bias, a, b, scaling, backend), _ = problem(torch.float64, (2,))
    x, a = (t.detach()[:, :32].requires_grad_() for t in (x, a))
    bias, b = (t.detach()[:8].requires_grad_() for t in (bias, b))
    weight = PackedWeight(weight.packed[:8, :16], weight.scale[:8, :2], weight.global_scale)
    assert torch.autograd.gradcheck(
        lambda x, bias, a, b: nvfp4_lora_linear(x, weight, bias, a, b, scaling, backend), (x, bias, a, b)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_copy_of_the_weight_is_saved_for_backward(dtype):
    arguments, _ = problem(dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = nvfp4_lora_linear(*arguments)
    x, weight, _, a, b, _, _ = arguments
    given = {t.data_ptr() for t in (x, weight.packed, weight.scale, a, b)}
    (extra,) = (t for t in saved if t.data_ptr() not in given)
    assert extra.shape == (7, RANK) and len(saved) == 6  # x A^T
    y.sum().backward()
    assert all(t.grad is not None for t in (x, a, b))


def test_no_gradient_that_nobody_wants(monkeypatch):
    """Without a gradient of x, as in the first layer, the backward pass does not touch the
    weight."""
    (x, *rest), _ = problem(torch.float32)
    y = nvfp4_lora_linear(x.detach(), *rest)
    monkeypatch.setattr(Backend, "block_values", lambda *args: pytest.fail("the weight was unpacked"))
    y.sum().backward()
    assert x.grad is None and all(t.grad is not None for t in rest[1:4])


def test_the_output_may_be_changed_in_place():
    arguments, _ = problem(torch.float64, (2, 3))
    want = nvfp4_lora_linear(*arguments) * 2
    torch.testing.assert_close(nvfp4_lora_linear(*arguments).mul_(2), want)


def test_input_and_gradient_need_not_be_contiguous():
    arguments, _ = problem(torch.float64, (6, 4))
    x, *rest = arguments
    other = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    (want,) = torch.autograd.grad(nvfp4_lora_linear(*arguments).sum(), [x])
    (got,) = torch.autograd.grad(nvfp4_lora_linear(other, *rest).sum(), [other])
    torch.testing.assert_close(got, want)
