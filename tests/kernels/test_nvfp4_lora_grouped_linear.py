"""The linears of experts with an adapter on each, against dense matrices in float64, forward and
backward."""

import pytest
import torch

from qerl_verl.kernels.nvfp4_grouped_linear import Groups, nvfp4_grouped_linear
from qerl_verl.kernels.nvfp4_lora_grouped_linear import grouped_dense_mm, grouped_outer, nvfp4_lora_grouped_linear
from tests.helpers.tiny_groups import COUNT, ERROR, K, N, make_rows, make_weights, relative

RANK, SCALING = 4, 0.5


def make_adapter(parts, n=N, k=K, rank=RANK, device="cpu"):
    """Returns A and B in float32, as they train."""
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(COUNT, parts * rank, k, generator=generator) * 0.3
    b = torch.randn(COUNT, n, rank, generator=generator) * 0.3
    return a.to(device), b.to(device)


def exact(x, plain, groups, a, b, parts, row_weights):
    """Computes in float64, with a dense matrix for each expert; leaves with gradients."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in (x, a, b, row_weights)]
    x, a, b, row_weights = leaves
    delta = torch.cat([
        torch.einsum("enr,erk->enk", b_, a_) for a_, b_ in zip(a.chunk(parts, 1), b.chunk(parts, 1), strict=True)
    ], 1)  # fmt: skip
    y = torch.einsum("snk,sk->sn", (plain + SCALING * delta)[groups.experts], x)
    return (y if row_weights is None else y * row_weights[:, None]), leaves


def check(dtype, parts, weighted, device="cpu", n=N, k=K, rank=RANK, tokens=23, backend="pytorch", bound=None):
    weights, plain = make_weights(parts, n, k, device, backend)
    x, groups = make_rows(dtype, tokens, k, device)
    leaves = [x.requires_grad_(), *(t.requires_grad_() for t in make_adapter(parts, n, k, rank, device)), None]
    if weighted:
        leaves[3] = torch.rand(len(x), device=device).to(dtype).requires_grad_()
    x, a, b, row_weights = leaves
    grad = torch.randn(len(x), n, device=device).to(dtype)
    y = nvfp4_lora_grouped_linear(x, weights, groups, a, b, SCALING, row_weights)
    y.backward(grad)
    # what the factors are rounded to is no error of the operator's
    expected, wide = exact(x, plain, groups, a.to(dtype), b.to(dtype), parts, row_weights)
    expected.backward(grad.double())
    bound = bound or ERROR[dtype]
    assert y.dtype == dtype and relative(y, expected.detach()) < bound
    for leaf, other in zip(leaves, wide, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == leaf.dtype and relative(leaf.grad, other.grad) < bound
    for t in (a.grad, b.grad):
        assert not t[2].any() and t[0].any()  # expert 2 has no rows


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize(("parts", "weighted"), [(2, False), (1, True)])
def test_forward_and_gradients_are_the_dense_matrices(dtype, parts, weighted):
    """As gate and up, with an A and a B each, and as down, with the router's weights."""
    # float64 factors come as float32, so the operator's own error is float32's there
    check(dtype, parts, weighted, bound={torch.float64: 1e-7, torch.bfloat16: 3e-2}.get(dtype))


def test_without_a_delta_it_is_the_base():
    weights, _ = make_weights(2)
    x, groups = make_rows(torch.float32)
    a, b = make_adapter(2)
    found = nvfp4_lora_grouped_linear(x, weights, groups, a, torch.zeros_like(b), SCALING)
    assert torch.equal(found, nvfp4_grouped_linear(x, weights, groups))


def test_nothing_decoded_is_saved():
    weights, _ = make_weights(1)
    x, groups = make_rows(torch.float32)
    a, b = (t.requires_grad_() for t in make_adapter(1))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nvfp4_lora_grouped_linear(x.requires_grad_(), weights, groups, a, b, SCALING, torch.rand(len(x)))
    assert any(t.dtype == torch.uint8 for t in saved)
    assert not any(t.is_floating_point() and t.numel() >= COUNT * N * K for t in saved)


def test_no_rows():
    weights, _ = make_weights(1)
    x, groups = torch.zeros(0, K, requires_grad=True), Groups.of(torch.zeros(0, dtype=torch.int64), COUNT)
    a, b = (t.requires_grad_() for t in make_adapter(1))
    y = nvfp4_lora_grouped_linear(x, weights, groups, a, b, SCALING)
    y.sum().backward()
    assert y.shape == (0, N) and not a.grad.any() and not b.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["pytorch", "triton", "hopper"])
@pytest.mark.parametrize(("parts", "weighted"), [(2, False), (1, True)])
def test_grouped_gemms_of_pytorch(backend, parts, weighted):
    """On a GPU the grouped GEMMs compute what the loop over the experts does."""
    from qerl_verl.kernels.backends import get_backend

    if reason := get_backend(backend).unsupported_device(torch.device("cuda", 0)):
        pytest.skip(reason)
    sizes = dict(n=256, k=128, rank=16, tokens=301)
    check(torch.bfloat16, parts, weighted, "cuda", backend=backend, bound=3e-2, **sizes)
    x, groups = make_rows(torch.bfloat16, 301, 128, "cuda")
    a, _ = make_adapter(1, 256, 128, 16, "cuda")
    u = grouped_dense_mm(x, a.bfloat16(), groups)
    assert relative(u, torch.einsum("srk,sk->sr", a.bfloat16().double()[groups.experts], x.double())) < 1e-2
    outer = grouped_outer(u, x, groups)
    assert outer.shape == (COUNT, 16, 128) and not outer[2].any()
