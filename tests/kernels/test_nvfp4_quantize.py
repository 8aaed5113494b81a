"""quantize_nvfp4 against compressed-tensors, byte for byte.

The reference is compressed-tensors' own code: ``calculate_qparams`` for the block scales and
``NVFP4PackedCompressor.compress`` for codes and packing.
"""

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_quantize import (
    FOUR_OVER_SIX_SCALE_MAX,
    nvfp4_global_scale,
    quantize_nvfp4,
    quantize_nvfp4_four_over_six,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _no_compile():
    """compressed-tensors rounds to E2M1 in a torch.compile'd function; the same code runs eagerly
    in these tests."""
    with torch.compiler.set_stance("force_eager"):
        yield


def compressed_tensors_bytes(weight, global_scale):
    scheme = preset_name_to_scheme("NVFP4A16", ["Linear"])
    blocks = weight.unflatten(-1, (-1, 16))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    out = NVFP4PackedCompressor.compress(state, scheme)
    return out["weight_packed"], out["weight_scale"]


def assert_same_bytes(weight, global_scale):
    packed, scale = quantize_nvfp4(weight, global_scale)
    want_packed, want_scale = compressed_tensors_bytes(weight, global_scale)
    assert scale.dtype == want_scale.dtype == torch.float8_e4m3fn
    assert torch.equal(scale.view(torch.uint8), want_scale.view(torch.uint8))
    assert packed.dtype == want_packed.dtype == torch.uint8
    assert torch.equal(packed, want_packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, k", [(1, 16), (3, 48), (17, 80), (64, 1024), (5, 300_000 // 16 * 16)])
def test_random_weights(dtype, n, k):
    torch.manual_seed(n + k)
    weight = (torch.randn(n, k) * 0.02).to(dtype)
    assert_same_bytes(weight, nvfp4_global_scale(weight.abs().max()))


def test_chunks_do_not_show():
    """A weight of several chunks, the last one partial, gives what its rows give on their own."""
    torch.manual_seed(0)
    weight = torch.randn(1111, 512).bfloat16()
    global_scale = nvfp4_global_scale(weight.abs().max())
    packed, scale = quantize_nvfp4(weight, global_scale)
    for row in (0, 511, 512, 513, 1023, 1024, 1110):
        row_packed, row_scale = quantize_nvfp4(weight[row : row + 1], global_scale)
        assert torch.equal(packed[row], row_packed[0])
        assert torch.equal(scale[row].view(torch.uint8), row_scale[0].view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["sorted", "shuffled"])
@pytest.mark.parametrize("global_scale", [1.0, 3.7, 2688 / 0.19, 1e-3])
def test_every_16_bit_weight(dtype, order, global_scale):
    """All finite values of the dtype: subnormals, both zeros, overflow of the block scale, blocks
    that vanish."""
    values = torch.arange(1 << 16).to(torch.int16).view(dtype)
    values = values[torch.isfinite(values)]
    if order == "sorted":
        values = values.sort().values
    else:
        values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    assert_same_bytes(values[: len(values) // 16 * 16].view(-1, 16), torch.tensor([global_scale]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_even_code(dtype):
    """Block scale and global scale are one, so that the weights are the E2M1 inputs themselves."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.cat([torch.tensor([6.0, 0.0]), ties, -ties]).view(1, 16).to(dtype)
    packed, scale = quantize_nvfp4(weight, torch.ones(1))
    assert scale.float().item() == 1.0
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten().tolist()
    even = [0, 2, 2, 4, 4, 6, 6]
    assert codes == [7, 0, *even, *(8 + c for c in even)]  # -0.25 is the negative zero, code 8
    assert_same_bytes(weight, torch.ones(1))


def test_both_sides_of_every_tie():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    below, above = torch.nextafter(ties, torch.zeros(7)), torch.nextafter(ties, torch.full((7,), 9.0))
    weight = torch.cat([below, above, torch.tensor([6.0, -0.0])]).view(1, 16)
    packed, _ = quantize_nvfp4(weight, torch.ones(1))
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten().tolist()
    assert codes == [0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7, 7, 0]  # a weight of -0.0 is code 0
    assert_same_bytes(weight, torch.ones(1))


def test_zero_and_vanishing_blocks():
    weight = torch.zeros(4, 16)
    weight[1] = -0.0
    weight[2] = -1e-30  # scale rounds to zero
    weight[3, 0] = 1.0
    global_scale = nvfp4_global_scale(weight.abs().max())
    packed, scale = quantize_nvfp4(weight, global_scale)
    assert scale.float().flatten().tolist() == [0.125, 0.125, 0.125, 448.0]
    assert packed[:2].eq(0).all() and packed[2].eq(0x88).all()
    assert dequantize_nvfp4(packed, scale, global_scale)[:3].eq(0).all()
    assert_same_bytes(weight, global_scale)


def test_block_scale_saturates_at_448():
    weight = torch.full((1, 16), 6.0)
    packed, scale = quantize_nvfp4(weight, torch.tensor([1000.0]))
    assert scale.float().item() == 448.0 and packed.eq(0x77).all()
    assert_same_bytes(weight, torch.tensor([1000.0]))


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 7.8e-36, 8e-36, 1e-4, 0.37, 448.0, 6.5e4, 3e38])
def test_global_scale(amax):
    amax = torch.tensor(amax)
    scale = nvfp4_global_scale(amax)
    assert scale.shape == (1,) and scale.dtype == torch.float32
    assert torch.equal(scale, generate_gparam(-amax, amax))


def test_global_scale_is_computed_in_float32():
    assert nvfp4_global_scale(torch.tensor(0.37, dtype=torch.bfloat16)).item() == pytest.approx(
        2688 / torch.tensor(0.37, dtype=torch.bfloat16).item(), rel=1e-7
    )


@pytest.mark.parametrize("amax", [[float("nan")], [float("inf")], [-1.0], [1.0, 2.0]])
def test_global_scale_rejects(amax):
    with pytest.raises(ValueError, match="one finite value"):
        nvfp4_global_scale(torch.tensor(amax))


@pytest.mark.parametrize("dtype", DTYPES)
def test_signal_to_noise(dtype):
    """Gaussian weights come back at 20 dB: about 0.5 bit a value better than a uniform 4-bit grid
    of the same range."""
    torch.manual_seed(0)
    weight = (torch.randn(256, 512) * 0.02).to(dtype)
    global_scale = nvfp4_global_scale(weight.abs().max())
    back = dequantize_nvfp4(*quantize_nvfp4(weight, global_scale), global_scale, torch.float64)
    noise = (back - weight.double()).square().mean()
    assert 10 * torch.log10(weight.double().square().mean() / noise) > 20


def test_quantizing_twice_changes_nothing():
    torch.manual_seed(0)
    weight = torch.randn(64, 256) * 0.02
    global_scale = nvfp4_global_scale(weight.abs().max())
    packed, scale = quantize_nvfp4(weight, global_scale)
    again, scale_again = quantize_nvfp4(dequantize_nvfp4(packed, scale, global_scale, torch.float32), global_scale)
    values = dequantize_nvfp4(packed, scale, global_scale, torch.float64)
    assert torch.equal(dequantize_nvfp4(again, scale_again, global_scale, torch.float64), values)


@pytest.mark.parametrize(
    "weight, global_scale, message",
    [
        (torch.zeros(4, 24), torch.ones(1), "multiple of 16"),
        (torch.zeros(32), torch.ones(1), "multiple of 16"),
        (torch.zeros(4, 16, dtype=torch.float64), torch.ones(1), "float32, bfloat16 or float16"),
        (torch.zeros(4, 16), torch.ones(2), "one float32"),
        (torch.zeros(4, 16), torch.ones(1, dtype=torch.bfloat16), "one float32"),
    ],
)
def test_rejects(weight, global_scale, message):
    with pytest.raises(ValueError, match=message):
        quantize_nvfp4(weight, global_scale)


# --- four over six --------------------------------------------------------------------------------


def by_definition(block, global_scale):
    """Quantizes one block as arXiv 2512.02010 defines, in float64 from the float32 scales: the
    better of the two; value and scale."""
    candidates = []
    for largest in (6.0, 4.0):
        scale = (block.abs().max() / largest * global_scale).clamp(max=448).to(torch.float8_e4m3fn).float()
        step = ((scale if scale > 0 else torch.tensor(0.125)) / global_scale).double()
        grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64) * step
        grid = torch.cat((grid, -grid))
        values = grid[(block.double()[:, None] - grid).abs().argmin(1)]
        candidates.append((((values - block.double()) ** 2).sum().item(), values, scale))
    return min(candidates, key=lambda c: c[0])


def test_four_over_six_takes_the_better_scale():
    torch.manual_seed(0)
    weight = torch.randn(64, 64) * 0.02
    global_scale = nvfp4_global_scale(weight.abs().max(), FOUR_OVER_SIX_SCALE_MAX)
    packed, scale = quantize_nvfp4_four_over_six(weight, global_scale)
    decoded = dequantize_nvfp4(packed, scale, global_scale, torch.float64).view(-1, 16)
    fours = 0
    for block, got, s in zip(weight.view(-1, 16), decoded, scale.view(-1), strict=True):
        error, values, want_scale = by_definition(block, global_scale)
        assert ((got - block.double()) ** 2).sum().item() == pytest.approx(error, rel=1e-5)
        # 1/4 or 1/6 of the block's maximum
        fours += s.float() * block.abs().max().reciprocal() / global_scale > 0.2
        assert s.float() == (want_scale if want_scale > 0 else 0.125) or got.allclose(values, rtol=1e-5)
    assert 0.2 * len(decoded) < fours < 0.8 * len(decoded)  # both are taken
    plain = dequantize_nvfp4(*quantize_nvfp4(weight, global_scale), global_scale, torch.float64).view(-1, 16)
    errors = [((d - weight.view(-1, 16)) ** 2).sum(-1) for d in (decoded, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all() and errors[0].sum() < 0.9 * errors[1].sum()


def test_four_over_six_has_room_for_its_larger_scale():
    """The block with the largest weight of all: 4 needs a scale of 256 * 6 / 4 = 384, which E4M3
    holds."""
    weight = torch.zeros(1, 32)
    weight[0, :16] = torch.tensor([4.0, 3.0, 2.0, 1.5] * 4)  # exact where the maximum becomes 4
    global_scale = nvfp4_global_scale(weight.abs().max(), FOUR_OVER_SIX_SCALE_MAX)
    packed, scale = quantize_nvfp4_four_over_six(weight, global_scale)
    assert scale[0, 0].float() == 384
    assert dequantize_nvfp4(packed, scale, global_scale, torch.float32).allclose(weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_four_over_six_of_zeros_and_signs(dtype):
    weight = torch.tensor([[0.0, -0.0, 1e-30, -1e-3] * 4, [0.0] * 16], dtype=dtype)
    packed, scale = quantize_nvfp4_four_over_six(weight, torch.tensor([1536.0]))
    values = dequantize_nvfp4(packed, scale, torch.tensor([1536.0]), torch.float32)
    assert (values[1] == 0).all() and (values[0, 3::4] < 0).all() and (values[0, ::4] == 0).all()
    assert scale.float().min() > 0


def test_four_over_six_rejects_what_rounding_rejects():
    with pytest.raises(ValueError, match="multiple of 16"):
        quantize_nvfp4_four_over_six(torch.zeros(2, 24), torch.ones(1))
