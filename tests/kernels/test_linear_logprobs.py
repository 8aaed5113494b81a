"""Log-probabilities in chunks of tokens against float64 and against the reference."""

import pytest
import torch

from qerl_verl.kernels import linear_logprobs as module
from qerl_verl.kernels.linear_logprobs import linear_logprobs, linear_logprobs_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(device, dtype, tokens=200, hidden=48, vocabulary=1000):
    torch.manual_seed(0)
    h = torch.randn(tokens, hidden, device=device).to(dtype)
    w = (torch.randn(vocabulary, hidden, device=device) * 0.3).to(dtype)
    return h, w, torch.randint(0, vocabulary, (tokens,), device=device)


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 64 * 1000 * 4)
    assert module.chunk_size(1000) == 64


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("used", ["both", "log_p", "entropy"])
def test_outputs_and_gradients(device, dtype, used):
    h, w, labels = problem(device, dtype)
    exact_h, h = h.double().requires_grad_(), h.requires_grad_()
    log_p, entropy = linear_logprobs(h, w, labels, 0.7)
    exact_log_p, exact_entropy = linear_logprobs_exact(exact_h, w.double(), labels, 0.7)
    assert log_p.dtype == entropy.dtype == torch.float32
    weights = torch.randn(2, len(labels), device=device)
    weights[{"both": [], "log_p": [1], "entropy": [0]}[used]] = 0
    if used == "both":
        (weights[0] * log_p + weights[1] * entropy).sum().backward()
    else:
        (weights[0] * log_p if used == "log_p" else weights[1] * entropy).sum().backward()
    (weights[0] * exact_log_p + weights[1] * exact_entropy).sum().backward()
    # The logits are rounded to dtype, an error of eps of their size; a log-probability is a
    # difference of two such numbers.
    eps = torch.finfo(dtype).eps
    size = (exact_h @ w.double().t() / 0.7).abs().max().item() + exact_log_p.abs().max().item()
    assert (log_p - exact_log_p).abs().max() < 2 * eps * size
    assert (entropy - exact_entropy).abs().max() < 4 * eps * size * size
    assert (h.grad.double() - exact_h.grad).norm() / exact_h.grad.norm() < 4 * eps * size


def linear_logprobs_exact(h, w, labels, temperature):
    log_p = (h @ w.t() / temperature).log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def test_the_reference_is_the_same_function():
    h, w, labels = problem("cpu", torch.float32)
    for found, expected in zip(linear_logprobs(h, w, labels, 1.3), linear_logprobs_reference(h, w, labels, 1.3)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_no_logits_of_all_tokens_are_kept():
    h, w, labels = problem("cpu", torch.float32)
    log_p, _ = linear_logprobs(h.requires_grad_(), w, labels)
    saved = log_p.grad_fn.next_functions[0][0] if log_p.grad_fn.name() == "ViewBackward0" else log_p.grad_fn
    assert max(t.numel() for t in saved.saved_tensors) == max(h.numel(), w.numel())


def test_leading_dimensions():
    h, w, labels = problem("cpu", torch.float32, tokens=12)
    log_p, entropy = linear_logprobs(h.view(3, 4, -1), w, labels.view(3, 4))
    assert log_p.shape == entropy.shape == (3, 4)
    torch.testing.assert_close(log_p.flatten(), linear_logprobs(h, w, labels)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h, w, y: (h, w, y[:-1]), "do not fit together"),
        (lambda h, w, y: (h, w[:, 1:], y), "do not fit together"),
        (lambda h, w, y: (h, w.requires_grad_(), y), "frozen"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_logprobs(*change(*problem("cpu", torch.float32)))
