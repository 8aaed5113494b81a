"""Tests GPTQ's solver against the formulas of the paper, written out column by column in
float64."""

import pytest
import torch

from qerl_verl.kernels.nvfp4_dequantize import E2M1_VALUES
from qerl_verl.nvfp4.gptq import DAMPING, Hessian, gptq_codes, inverse_factor

VALUES = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])


def problem(n=24, k=272, tokens=700, seed=0):
    """Returns weight ``[n, k]``, correlated inputs ``[tokens, k]`` of very different size, and
    steps ``[n, k / 16]``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) * torch.rand(k, generator=generator)
    inputs = torch.randn(tokens, k, generator=generator) @ mixing
    weight = torch.randn(n, k, generator=generator) * 0.05
    step = weight.view(n, -1, 16).abs().amax(-1) / 6
    return weight, inputs, step


def hessian_of(inputs):
    hessian = Hessian.empty(inputs.shape[1], inputs.device)
    hessian.add(inputs)
    return hessian.sum


def decode(codes, step):
    return VALUES[codes.int()] * step.repeat_interleave(16, 1)


def column_by_column(weight, hessian, step):
    """Implements Algorithm 1 of arXiv 2210.17323 with all of H^-1.

    It eliminates one channel at a time, the most active first.
    """
    weight, hessian = weight.double(), hessian.double()
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    hessian = hessian + torch.eye(len(hessian)) * DAMPING * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian[order][:, order])
    weight, step = weight[:, order].clone(), step.double().repeat_interleave(16, 1)[:, order]
    rounded = torch.empty_like(weight)
    for i in range(len(order)):
        distance = (weight[:, i, None] / step[:, i, None] - VALUES.double()).abs()
        rounded[:, i] = VALUES.double()[distance.argmin(1)] * step[:, i]
        error = (weight[:, i] - rounded[:, i]) / inverse[0, 0]
        weight[:, i + 1 :] -= error[:, None] * inverse[0, 1:]
        inverse = inverse[1:, 1:] - inverse[1:, :1] * inverse[:1, 1:] / inverse[0, 0]
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


def output_error(weight, rounded, inputs):
    return ((inputs.double() @ (weight - rounded).double().t()) ** 2).sum().item()


def test_as_the_paper_has_it():
    weight, inputs, step = problem()
    hessian = hessian_of(inputs)
    ours = decode(gptq_codes(weight, hessian, step), step)
    reference = column_by_column(weight, hessian, step)
    # float32 and another order of additions: now and then a value between two codes goes to the
    # other code, and its row follows. Most values are equal, and the error of the outputs, which
    # counts, is equal.
    assert (ours.double() - reference).abs().lt(1e-6).float().mean() > 0.7
    assert output_error(weight, ours, inputs) == pytest.approx(output_error(weight, reference, inputs), rel=0.03)


def test_better_outputs_than_rounding():
    weight, inputs, step = problem(seed=1)
    nearest = (weight.view(24, -1, 16, 1) / step[..., None, None] - VALUES).abs().argmin(-1).view(24, -1)
    rounded = decode(nearest, step)
    ours = decode(gptq_codes(weight, hessian_of(inputs), step), step)
    fresh = problem(seed=1, tokens=1400)[1][700:]
    assert output_error(weight, ours, fresh) < 0.5 * output_error(weight, rounded, fresh)
    assert ((weight - ours) ** 2).sum() > ((weight - rounded) ** 2).sum()  # the weights get worse


def test_factor():
    _, inputs, _ = problem()
    inputs[:, 7] = 0
    hessian = hessian_of(inputs)
    factor = inverse_factor(hessian.clone())
    damped = hessian.double()
    damped[7, 7] = 1
    damped += torch.eye(len(damped)) * DAMPING * damped.diagonal().mean()
    assert torch.equal(factor.triu(), factor)
    product = factor.double().t() @ factor.double() @ damped
    assert (product - torch.eye(len(damped))).abs().max() < 1e-3


def test_channels_that_are_never_active_are_rounded_to_nearest():
    weight, inputs, step = problem()
    inputs[:, 32:48] = 0
    codes = gptq_codes(weight, hessian_of(inputs), step)[:, 32:48]
    nearest = (weight[:, 32:48, None] / step[:, 2:3, None] - VALUES).abs().argmin(-1)
    assert torch.equal(VALUES[codes.int()], VALUES[nearest])


def test_fewer_tokens_than_channels():
    """The Hessian has rank 5, and only damping makes it invertible."""
    weight, inputs, step = problem(tokens=5)
    ours = decode(gptq_codes(weight, hessian_of(inputs), step), step)
    assert torch.isfinite(ours).all()
    assert output_error(weight, ours, inputs) < output_error(weight, torch.zeros_like(weight), inputs) * 1e-2


def test_damping_is_raised_until_it_suffices():
    hessian = torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = 1.0 + 1.0  # not positive semidefinite: eigenvalue -1
    factor = inverse_factor(hessian)
    assert torch.isfinite(factor).all() and (factor.diagonal() > 0).all()


def test_nan_is_refused():
    weight, inputs, step = problem()
    inputs[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        gptq_codes(weight, hessian_of(inputs), step)


def test_rows_do_not_depend_on_each_other():
    """Linears with the same input can therefore be solved together."""
    weight, inputs, step = problem()
    hessian = hessian_of(inputs)
    together = gptq_codes(weight, hessian, step)
    alone = torch.cat([gptq_codes(w, hessian, s) for w, s in zip(weight.split(8), step.split(8), strict=True)])
    assert (together == alone).float().mean() > 0.99  # up to the order of additions in GEMMs


@pytest.mark.gpu
def test_on_a_gpu():
    """The CUDA graph computes what the loop computes, and errors are about those of the CPU."""
    weight, inputs, step = problem()
    hessian = hessian_of(inputs)
    cpu = decode(gptq_codes(weight, hessian, step), step)
    on_gpu = [gptq_codes(*(t.cuda() for t in (weight, hessian, step))).cpu() for _ in range(2)]
    assert torch.equal(*on_gpu)
    gpu = decode(on_gpu[0], step)
    assert output_error(weight, gpu, inputs) == pytest.approx(output_error(weight, cpu, inputs), rel=0.03)
