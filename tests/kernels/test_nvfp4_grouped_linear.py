"""The linears of experts against dense matrices in float64, forward and backward."""

import pytest
import torch

from qerl_verl.kernels.backends import get_backend
from qerl_verl.kernels.nvfp4_grouped_linear import (
    Combine,
    Dispatch,
    Groups,
    grouped_mm,
    grouped_mm_reference,
    nvfp4_grouped_linear,
)
from tests.helpers.tiny_groups import COUNT, ERROR, K, N, make_rows, make_weights, relative


def test_groups_end_where_the_experts_rows_do():
    groups = Groups.of(torch.tensor([0, 0, 1, 3, 3, 3]), 5)
    assert groups.ends.tolist() == [2, 3, 3, 6, 6] and groups.ends.dtype == torch.int32


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("parts", "weighted"), [(2, False), (1, True)])
def test_forward_and_gradients_are_the_dense_matrices(dtype, parts, weighted):
    """As gate and up, with two global scales an expert, and as down, with the router's weights."""
    weights, plain = make_weights(parts)
    x, groups = make_rows(dtype)
    x.requires_grad_()
    row_weights = torch.rand(len(x)).to(dtype).requires_grad_() if weighted else None
    grad = torch.randn(len(x), N).to(dtype)
    y = nvfp4_grouped_linear(x, weights, groups, row_weights)
    y.backward(grad)

    exact = x.detach().double().requires_grad_()
    factors = row_weights.detach().double().requires_grad_() if weighted else None
    expected = torch.einsum("snk,sk->sn", plain[groups.experts], exact)
    expected = expected if factors is None else expected * factors[:, None]
    expected.backward(grad.double())
    assert y.dtype == x.grad.dtype == dtype
    assert relative(y, expected.detach()) < ERROR[dtype]
    assert relative(x.grad, exact.grad) < ERROR[dtype]
    if weighted:
        assert row_weights.grad.dtype == dtype and relative(row_weights.grad, factors.grad) < ERROR[dtype]


def test_nothing_decoded_is_saved():
    weights, _ = make_weights(1)
    x, groups = make_rows(torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nvfp4_grouped_linear(x.requires_grad_(), weights, groups, torch.rand(len(x)))
    assert any(t.dtype == torch.uint8 for t in saved)
    assert not any(t.is_floating_point() and t.numel() >= N * K for t in saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_expert_decoded_is_a_part_of_all(dtype):
    weights, plain = make_weights(2)
    whole = weights.decode(dtype)
    for expert in range(COUNT):
        assert torch.equal(weights.decode_one(expert, dtype), whole[expert])
    factors = weights.factors(dtype).repeat_interleave(N // 2, 1)[..., None]
    assert relative(whole * factors, plain) < (1e-6 if dtype == torch.float32 else 1e-3)


def test_float16_does_not_overflow():
    """Codes times block scales go up to 2688; a thousand of them leave float16's range, and the
    weights do not."""
    weights, plain = make_weights(1, 16, 1024)
    x, groups = make_rows(torch.float16, k=1024)
    x.fill_(0.5).copysign_(plain[groups.experts][:, 0])
    y = nvfp4_grouped_linear(x, weights, groups)
    assert torch.isfinite(y).all() and (grouped_mm_reference(x.float(), weights, groups).abs() > 65504).any()
    assert relative(y, torch.einsum("snk,sk->sn", plain[groups.experts], x.double())) < 4e-3


def test_no_rows():
    weights, _ = make_weights(1)
    x, groups = torch.zeros(0, K, requires_grad=True), Groups.of(torch.zeros(0, dtype=torch.int64), COUNT)
    y = nvfp4_grouped_linear(x, weights, groups)
    y.sum().backward()
    assert y.shape == (0, N) and x.grad.shape == (0, K)


def test_tokens_go_to_their_experts_and_back():
    """Dispatch and combine are each other's transpose, and add up in the order of a token's
    experts."""
    tokens, k, hidden = 7, 3, 4
    ids = torch.randint(COUNT, (tokens, k))
    order = torch.sort(ids.flatten(), stable=True)[1]
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    x = torch.randn(tokens, hidden, dtype=torch.float64, requires_grad=True)
    rows = Dispatch.apply(x, order, inverse, k)
    assert torch.equal(rows, x.repeat_interleave(k, 0)[order])
    assert torch.allclose(Combine.apply(rows, order, inverse, k), k * x)
    assert torch.autograd.gradcheck(lambda t: Dispatch.apply(t, order, inverse, k), x)
    assert torch.autograd.gradcheck(lambda t: Combine.apply(t, order, inverse, k), rows.detach().requires_grad_())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["pytorch", "triton", "hopper"])
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_mm_is_the_reference(backend, transposed):
    """The grouped GEMM of PyTorch on each backend's layout, with an expert without rows."""
    if reason := get_backend(backend).unsupported_device(torch.device("cuda", 0)):
        pytest.skip(reason)
    weights, plain = make_weights(2, 256, 128, "cuda", backend)
    x, groups = make_rows(torch.bfloat16, 301, 256 if transposed else 128, "cuda")
    found = grouped_mm(x, weights, groups, transposed)
    assert torch.equal(weights.decode_one(3, torch.bfloat16), weights.decode(torch.bfloat16)[3])
    expected = grouped_mm_reference(x, weights, groups, transposed)
    assert relative(found, expected.double()) < 1e-2
    if not transposed:
        exact = torch.einsum("snk,sk->sn", plain[groups.experts], x.double())
        assert relative(nvfp4_grouped_linear(x, weights, groups), exact) < 1e-2


@pytest.mark.gpu
def test_rows_that_no_expert_has_stay_out_of_the_grouped_gemm():
    """All rows belong to the last expert, or there are none."""
    weights, plain = make_weights(1, 128, 64, "cuda")
    for tokens in (0, 33):
        groups = Groups.of(torch.full((tokens,), COUNT - 1, device="cuda"), COUNT)
        x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = nvfp4_grouped_linear(x, weights, groups, torch.ones(tokens, device="cuda"))
        y.sum().backward()
        assert y.shape == (tokens, 128) and x.grad.isfinite().all()
        if tokens:
            assert relative(y.detach(), x.detach().double() @ plain[-1].t()) < 1e-2
