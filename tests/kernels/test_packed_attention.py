"""Attention over packed sequences against float64 attention of each sequence by itself."""

import pytest
import torch

from qerl_verl.kernels.packed_attention import packed_attention, packed_attention_reference, packing_of, unsupported

LENGTHS = (5, 1, 17, 64, 3)
FLASH = pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu)


def positions(lengths=LENGTHS, device="cpu"):
    return torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).to(device)


def expected_attention(query, key, value, lengths, scale, window):
    """Scores, mask and softmax written out in float64."""
    repeats, outputs, begin = query.shape[1] // key.shape[1], [], 0
    for length in lengths:
        part = slice(begin, begin + length)
        q, k, v = query[part].double(), key[part].double(), value[part].double()
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        allowed = (distance >= 0) & (distance < (window or length))
        scores = scores.masked_fill(~allowed.to(scores.device), float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
        begin += length
    return torch.cat(outputs)


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float32), ("cpu", torch.bfloat16), FLASH])
@pytest.mark.parametrize("heads, groups", [(4, 4), (8, 2)])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients(device, dtype, heads, groups, window, scale):
    torch.manual_seed(0)
    shapes = [(sum(LENGTHS), n, 64) for n in (heads, groups, groups)]
    inputs = [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    y = packed_attention(*inputs, packing_of(positions(device=device)), scale, window)
    expected = expected_attention(*exact, LENGTHS, 64**-0.5 if scale is None else scale, window)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    y.backward(grad.to(dtype))
    assert y.dtype == dtype and y.shape == shapes[0]
    # Rounding of what goes in and out, and of float32 sums of 64 products that the softmax then
    # exponentiates.
    bound = 4 * torch.finfo(dtype).eps + 64 * torch.finfo(torch.float32).eps
    for found, exact_value in [(y, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact))]:
        assert (found.double() - exact_value).norm() / exact_value.norm() < bound


def test_packing():
    packing = packing_of(positions())
    assert packing.host_offsets == (0, 5, 6, 23, 87, 90) and packing.longest == 64
    assert packing.offsets.dtype == torch.int32 and tuple(packing.offsets.tolist()) == packing.host_offsets


@pytest.mark.parametrize(
    "position_ids, message",
    [
        (torch.zeros(2, 3, dtype=torch.long), r"\[1, tokens\], got \[2, 3\]"),
        (torch.zeros(1, 0, dtype=torch.long), r"\[1, tokens\]"),
        (torch.tensor([[1, 2, 0]]), "begin with 0"),
    ],
)
def test_positions_that_say_nothing_of_the_sequences_are_refused(position_ids, message):
    with pytest.raises(ValueError, match=message):
        packing_of(position_ids)


def test_what_flash_attention_does_not_serve():
    assert "not on cpu" in unsupported(torch.zeros(1, 1, 64))
    packing = packing_of(positions((3,)))
    q = torch.randn(3, 1, 5)
    torch.testing.assert_close(packed_attention(q, q, q, packing), packed_attention_reference(q, q, q, packing))
