"""The portable kernels against their references. ``test_portable.py`` runs this file in processes of its own.

In Triton's interpreter (TRITON_INTERPRET=1) on a CPU, or on a GPU. The group ``compile`` needs neither. Each table has a part that
is not marked slow.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import library

from qerl_verl.kernels import portable
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_experts import ExpertStack
from qerl_verl.kernels.nvfp4_fp8_linear import (
    nvfp4_fp8_linear_reference,
    nvfp4_to_fp8_reference,
    quantize_rows_reference,
    through_fp8,
)
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    # The bounds of a kernel's loop are arrays of one element in Triton 3.6's interpreter, which
    # takes their int() (triton/runtime/interpreter.py, _patch_lang_tensor); NumPy 2.4 and newer
    # convert arrays without dimensions alone.
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _patch_with_index(tensor, scope):
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_with_index
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
DTYPES = [torch.bfloat16, torch.float16]
ALPHA = 1 / 640.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def random_weight(n, k, scales=(1, 127)):
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    return packed, torch.randint(*scales, (n, k // 16), dtype=torch.uint8)


def every_value(k):
    """254 rows, one for each finite E4M3 byte, with all sixteen E2M1 codes in low and in high nibbles."""
    code = torch.arange(16, dtype=torch.uint8)
    both = torch.cat((code | code.flip(0) << 4, code << 4 | code.flip(0)))  # 64 input channels
    scale = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    return both.repeat(254, k // 64), scale[:, None].repeat(1, k // 16)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.cpu().contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


# -------------------------------------------------------------------------------------------------- dequantize
class TestDequantize:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("transposed", [False, True])
    def test_every_code_and_scale(self, dtype, transposed):
        packed, scale = every_value(64)
        expected = block_values_nvfp4(packed, scale, dtype)
        got = portable.dequantize(*on_device(packed, scale), dtype, transposed)
        assert got.is_contiguous()
        assert same_bits(got, expected.t() if transposed else expected)  # signs of zeros, too

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("n, k", [(1, 16), (3, 48), (33, 80), (37, 64), (64, 128), (129, 272)])
    def test_shapes(self, dtype, transposed, n, k):
        packed, scale = random_weight(n, k)
        expected = block_values_nvfp4(packed, scale, dtype)
        got = portable.dequantize(*on_device(packed, scale.view(torch.float8_e4m3fn)), dtype, transposed)
        assert same_bits(got, expected.t() if transposed else expected)

    def test_power_of_two_factor(self):
        from qerl_verl.kernels.portable.nvfp4_dequantize import nvfp4_dequantize
        from qerl_verl.kernels.portable.nvfp4_gemm import FLOAT16_FACTOR

        packed, scale = every_value(64)
        got = nvfp4_dequantize(*on_device(packed, scale), torch.float16, factor=FLOAT16_FACTOR)
        expected = block_values_nvfp4(packed, scale, torch.float64) * FLOAT16_FACTOR
        assert torch.equal(got.cpu().double(), expected)

    def test_not_contiguous(self):
        packed, scale = random_weight(32, 128)
        expected = block_values_nvfp4(packed[::2, 8:40], scale[::2, 1:5], torch.bfloat16)
        packed, scale = on_device(packed, scale)
        assert same_bits(portable.dequantize(packed[::2, 8:40], scale[::2, 1:5]), expected)

    def test_empty(self):
        assert portable.dequantize(*on_device(*random_weight(0, 64))).shape == (0, 64)


# ---------------------------------------------------------------------------------------------------- quantize
def assert_same_bytes(weight, global_scale):
    packed, scale = portable.quantize(*on_device(weight, global_scale))
    expected, expected_scale = quantize_nvfp4(weight, global_scale)
    assert scale.dtype == torch.float8_e4m3fn
    assert torch.equal(scale.cpu().view(torch.uint8), expected_scale.view(torch.uint8))
    assert torch.equal(packed.cpu(), expected)


class TestQuantize:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
    @pytest.mark.parametrize("n, k", [(1, 16), (3, 48), (17, 80), (64, 512)])
    def test_random(self, dtype, n, k):
        weight = (torch.randn(n, k) * 0.02).to(dtype)
        assert_same_bytes(weight, nvfp4_global_scale(weight.abs().max()))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("order", ["sorted", "shuffled"])
    @pytest.mark.parametrize("global_scale", [slow(1.0), 3.7, slow(2688 / 0.19), slow(1e-3)])
    def test_every_16_bit_weight(self, dtype, order, global_scale):
        values = torch.arange(1 << 16).to(torch.int16).view(dtype)
        values = values[torch.isfinite(values)]
        values = values.sort().values if order == "sorted" else values[torch.randperm(len(values))]
        assert_same_bytes(values[: len(values) // 16 * 16].view(-1, 16), torch.tensor([global_scale]))

    @pytest.mark.parametrize("global_scale", [slow(1.0), 3.7, slow(1e-3), 1e30])
    def test_float32_of_every_magnitude(self, global_scale):
        weight = torch.randint(-(2**31), 2**31, (1024, 32)).to(torch.int32).view(torch.float32)
        weight = torch.where(torch.isfinite(weight), weight, 0.0)
        assert_same_bytes(weight, torch.tensor([global_scale]))
        exponent = torch.randint(-20, 20, (1024, 2, 1)).float()
        assert_same_bytes((torch.randn(1024, 2, 16) * 2**exponent).view(1024, 32), torch.tensor([global_scale]))

    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
    def test_ties(self, dtype):
        ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        assert_same_bytes(torch.cat([torch.tensor([6.0, 0.0]), ties, -ties]).view(1, 16).to(dtype), torch.ones(1))

    def test_both_sides_of_every_tie(self):
        ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        below, above = torch.nextafter(ties, torch.zeros(7)), torch.nextafter(ties, torch.full((7,), 9.0))
        for sign in (1, -1):
            assert_same_bytes(sign * torch.cat([below, above, torch.tensor([6.0, -0.0])]).view(1, 16), torch.ones(1))

    def test_every_block_scale_and_its_midpoints(self):
        """Scales at the E4M3 values, halfway between, and next to both."""
        grid = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        middle = (grid[1:] + grid[:-1]) / 2
        value = torch.cat([grid, middle])
        value = torch.cat(
            [value, torch.nextafter(value, torch.zeros(1)), torch.nextafter(value, torch.full((1,), 1e9))]
        )
        weight = torch.zeros(len(value), 16)
        weight[:, 3] = value * 6
        assert_same_bytes(weight, torch.ones(1))

    def test_zero_and_vanishing_blocks(self):
        weight = torch.zeros(4, 16)
        weight[1] = -0.0
        weight[2] = -1e-30
        weight[3, 0] = 1.0
        assert_same_bytes(weight, nvfp4_global_scale(weight.abs().max()))

    def test_block_scale_saturates(self):
        assert_same_bytes(torch.full((1, 16), 6.0), torch.tensor([1000.0]))

    def test_not_contiguous(self):
        assert_same_bytes(torch.randn(64, 48).t()[:, :32], torch.tensor([900.0]))


# -------------------------------------------------------------------------------------------------------- gemm
def check_product(x, packed, scale, bias, u, lora_b, y):
    """Against float64: half a step of the output, and float32 sums. More where a 16-bit result is added to."""
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], packed.shape[0])
    weight = block_values_nvfp4(packed, scale, torch.float64)
    expected = ALPHA * (x.double() @ weight.t())
    size = ALPHA * (x.double().abs() @ weight.abs().t())
    if u is not None:
        expected = expected + u.double() @ lora_b.double().t()
        size = size + u.double().abs() @ lora_b.double().abs().t()
    if bias is not None:
        expected = expected + bias.double()
    error = (y.cpu().double() - expected).abs()
    eps = torch.finfo(x.dtype).eps
    if portable.choose(x.numel() // x.shape[-1], *weight.shape).path == "dequantize":
        assert error.norm() <= 0.75 * eps * expected.norm()
    else:
        assert (error <= 0.501 * eps * expected.abs() + 2e-6 * size + 1e-7).all(), error.max()


def arguments(m, n, k, dtype, bias=True, rank=32, scales=(1, 127)):
    packed, scale = random_weight(n, k, scales)
    u, lora_b = (torch.randn(m, rank).to(dtype), torch.randn(n, rank).to(dtype)) if rank else (None, None)
    return torch.randn(m, k).to(dtype), packed, scale, torch.randn(n).to(dtype) if bias else None, u, lora_b


def call(x, packed, scale, bias, u, lora_b):
    x, packed, scale, bias, u, lora_b = on_device(x, packed, scale, bias, u, lora_b)
    return portable.gemm(x, packed, scale, ALPHA, bias, u, lora_b)


class TestGemm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias, rank", [(False, 0), (True, 0), (False, 16), (True, 48), (True, 64)])
    @pytest.mark.parametrize(
        "m, n, k", [(1, 130, 64), slow(3, 65, 192), slow(17, 64, 512), (33, 7, 128), slow(129, 200, 64)]
    )
    def test_product(self, dtype, bias, rank, m, n, k):
        args = arguments(m, n, k, dtype, bias, rank)
        check_product(*args, call(*args))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias, rank", [(False, 0), (True, 32)])
    def test_many_tokens(self, dtype, bias, rank):
        args = arguments(513, 33, 128, dtype, bias, rank)
        assert portable.choose(513, 33, 128).path == "dequantize"
        check_product(*args, call(*args))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_code_and_scale(self, dtype):
        """The product with the identity is the weight itself."""
        packed, scale = every_value(64)
        y = portable.gemm(torch.eye(64, dtype=dtype, device=DEVICE), *on_device(packed, scale), 1.0)
        assert torch.equal(y.cpu(), block_values_nvfp4(packed, scale, dtype).t())

    def test_every_input_channel(self):
        packed, scale = random_weight(70, 320)
        for plan_k in (64, 320):  # one tile, and several
            y = portable.gemm(
                torch.eye(320, dtype=torch.bfloat16, device=DEVICE)[:, :plan_k],
                *on_device(packed[:, : plan_k // 2], scale[:, : plan_k // 16]),
                1.0,
            )
            expected = block_values_nvfp4(packed, scale, torch.bfloat16).t()
            assert torch.equal(y.cpu()[:plan_k], expected[:plan_k])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("split", [1, 2, 3, 8])
    def test_split(self, dtype, split):
        """Parts of equal and unequal length, with bias and LoRA added once; the same bits each time."""
        from qerl_verl.kernels.portable.nvfp4_gemm import run_plan

        args = arguments(5, 67, 512, dtype, rank=16)
        x, packed, scale, bias, u, lora_b = on_device(*args)
        plan = portable.Plan("fused", 16, 64, 64, split, 4, 3)
        y = run_plan(x, packed, scale, ALPHA, bias, u, lora_b, plan)
        check_product(*args, y)
        assert torch.equal(y, run_plan(x, packed, scale, ALPHA, bias, u, lora_b, plan))

    @pytest.mark.parametrize("m", [1, 20, 40, 70])
    def test_every_tile(self, m):
        args = arguments(m, 129, 256, torch.bfloat16)
        check_product(*args, call(*args))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
    def test_every_tile_that_is_measured(self, dtype):
        from qerl_verl.kernels.portable import tuning
        from qerl_verl.kernels.portable.nvfp4_gemm import run_plan

        args = arguments(19, 130, 256, dtype, rank=16)
        for tile in tuning.MORE_TILES:
            block_m, block_n, block_k, warps, stages = tile
            plan = portable.Plan("fused", block_m, block_n, block_k, 2, warps, stages)
            check_product(*args, run_plan(*on_device(*args[:3]), ALPHA, *on_device(*args[3:]), plan))

    def test_chosen_split(self):
        args = arguments(4, 40, 2048, torch.bfloat16)
        assert portable.choose(4, 40, 2048).split_k > 1
        check_product(*args, call(*args))

    def test_negative_scales(self):
        packed, scale = random_weight(64, 128)
        scale = scale | torch.where(torch.rand(scale.shape) < 0.5, 0x80, 0).to(torch.uint8)
        args = torch.randn(3, 128).bfloat16(), packed, scale, None, None, None
        check_product(*args, call(*args))

    def test_leading_dimensions_and_strides(self):
        x, packed, scale, bias, u, lora_b = arguments(12, 32, 64, torch.bfloat16)
        x = torch.cat((x, x), -1).view(3, 4, 128)[..., 1:65]  # neither contiguous nor aligned
        u = u.view(3, 4, -1)
        check_product(x, packed, scale, bias, u, lora_b, call(x, packed, scale, bias, u, lora_b))

    def test_no_tokens(self):
        args = arguments(0, 32, 64, torch.bfloat16)
        assert call(*args).shape == (0, 32)


# ----------------------------------------------------------------------------------------------------- experts
def make_experts(count, hidden, inner):
    """Random experts, gate and up before down; the factors differ by expert."""
    stacks = []
    for n, k in ((2 * inner, hidden), (hidden, inner)):
        packed, scale = random_weight(count * n, k, (0x28, 0x40))
        alpha = torch.rand(count) * 0.05 / k**0.5 + 0.01
        stacks.append(ExpertStack(packed.view(count, n, -1), scale.view(count, n, -1), alpha))
    return stacks


class TestExperts:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "tokens, count, top_k, hidden, inner",
        [
            (1, 5, 2, 64, 64),
            slow(7, 3, 3, 192, 64),
            (40, 3, 1, 64, 128),
            slow(33, 2, 2, 128, 192),
            slow(150, 4, 2, 64, 64),
        ],
    )
    @pytest.mark.parametrize("other_ranks", [False, True])
    def test_as_the_reference(self, dtype, other_ranks, tokens, count, top_k, hidden, inner):
        """Within the roundings between the GEMMs; one expert has no tokens, and with ``other_ranks``
        some choices are another rank's."""
        from qerl_verl.kernels.nvfp4_experts import nvfp4_experts_reference

        gate_up, down = make_experts(count, hidden, inner)
        x = torch.randn(tokens, hidden).to(dtype)
        logits = torch.randn(tokens, count)
        if count > top_k:
            logits[:, 1] = -9.0
        weights, chosen = logits.softmax(-1).topk(top_k)
        if other_ranks:
            chosen[::2, 0] = -1
        exact = nvfp4_experts_reference(x.double(), weights, chosen, gate_up, down)
        place = lambda s: ExpertStack(*on_device(s.packed, s.scale, s.alpha))  # noqa: E731
        got = portable.experts(*on_device(x, weights, chosen), place(gate_up), place(down))
        assert got.dtype == dtype and got.shape == x.shape
        error = (got.cpu().double() - exact).norm() / exact.norm()
        assert error < 2 * torch.finfo(dtype).eps, error
        none = portable.experts(*on_device(x, weights, torch.full_like(chosen, -1)), place(gate_up), place(down))
        assert not none.any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
    def test_every_tile(self, dtype):
        """The same within roundings, whatever the tile; what is warmed up is what is launched."""
        from qerl_verl.kernels.portable.nvfp4_experts import TILES, choose_tile, nvfp4_experts

        stacks = [ExpertStack(*on_device(s.packed, s.scale, s.alpha)) for s in make_experts(3, 128, 128)]
        x = torch.randn(19, 128, device=DEVICE).to(dtype)
        weights, chosen = torch.randn(19, 3, device=DEVICE).softmax(-1).topk(2)
        portable.warm_up_experts(*stacks, 2, dtype)
        found = [nvfp4_experts(x, weights, chosen, *stacks, tile).double() for _, *tile in TILES]
        for other in found[1:]:
            assert (other - found[0]).norm() < torch.finfo(dtype).eps * found[0].norm()
        limits = [limit for limit, *_ in TILES]
        assert [choose_tile(rows * 4, 4) for rows in (limits[0], limits[1], limits[1] + 1)] == [t for _, *t in TILES]

    def test_no_tokens(self):
        stacks = [ExpertStack(*on_device(s.packed, s.scale, s.alpha)) for s in make_experts(2, 64, 64)]
        empty = torch.zeros(0, 2, device=DEVICE)
        out = portable.experts(torch.zeros(0, 64, device=DEVICE).bfloat16(), empty, empty.int(), *stacks)
        assert out.shape == (0, 64)

    def test_refuses(self):
        gate_up, down = (ExpertStack(*on_device(s.packed, s.scale, s.alpha)) for s in make_experts(2, 64, 64))
        x, weights = torch.zeros(3, 64, device=DEVICE).bfloat16(), torch.zeros(3, 1, device=DEVICE)
        chosen, apart = weights.int(), torch.stack([down.packed, down.packed], -1)[..., 0]
        cases = [
            ("bfloat16 or float16", lambda: portable.experts(x.float(), weights, chosen, gate_up, down)),
            ("multiple of 64, got 32", lambda: portable.experts(x[:, :32], weights, chosen, gate_up, down)),
            (r"weights and chosen \[T, k\]", lambda: portable.experts(x, weights[:2], chosen, gate_up, down)),
            ("need other shapes", lambda: portable.experts(x, weights, chosen, down, down)),
            (
                "have to be contiguous",
                lambda: portable.experts(x, weights, chosen, gate_up, ExpertStack(apart, down.scale, down.alpha)),
            ),
        ]
        for message, attempt in cases:
            with pytest.raises(ValueError, match=message):
                attempt()


# --------------------------------------------------------------------------------------------------------- fp8
def every_finite(dtype):
    """All finite values of a 16-bit type, in rows of 512 that span few or many orders of magnitude."""
    values = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
    values = values[torch.isfinite(values)]
    rest = torch.zeros(-len(values) % 512, dtype=dtype)
    by_size = torch.cat((values.sort().values, rest)).view(-1, 512)
    return torch.cat((by_size, torch.cat((values[torch.randperm(len(values))], rest)).view(-1, 512)))


def same_codes(got, expected):
    """E4M3 codes and powers of two."""
    assert got[0].dtype == expected[0].dtype == torch.float8_e4m3fn and got[1].dtype == torch.float32
    assert torch.equal(got[1].cpu(), expected[1])
    assert torch.equal(got[0].cpu().view(torch.uint8), expected[0].view(torch.uint8))


class TestFP8:
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
    def test_rows(self, dtype):
        for x in (torch.randn(5, 320).to(dtype), torch.zeros(2, 64, dtype=dtype), torch.randn(3, 50).to(dtype)):
            same_codes(portable.fp8_quantize(x.to(DEVICE)), quantize_rows_reference(x))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_value(self, dtype):
        x = every_finite(dtype)
        same_codes(portable.fp8_quantize(x.to(DEVICE)), quantize_rows_reference(x))

    def test_both_sides_of_448(self):
        top = (
            torch.tensor([447.0, 448.0, 448.0 * (1 + 2**-7), 512.0, 1e-38, 3e38]).bfloat16().unsqueeze(1).repeat(1, 64)
        )
        got = portable.fp8_quantize(top.to(DEVICE))
        same_codes(got, quantize_rows_reference(top))
        assert got[1][:4].tolist() == [1, 1, 2, 2]

    def test_long_rows_views_and_the_factor(self, monkeypatch):
        from qerl_verl.kernels.portable import fp8

        monkeypatch.setattr(fp8, "BLOCK_K", 128)
        x = torch.randn(3, 1000).bfloat16()[:, 1:700]
        codes, scale = quantize_rows_reference(x)
        same_codes(portable.fp8_quantize(x.to(DEVICE), 0.25), (codes, scale * 0.25))

    @pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
    def test_what_is_not_finite_stays_so(self, bad):
        x = torch.randn(2, 64).bfloat16()
        x[1, 7] = bad
        codes, scale = portable.fp8_quantize(x.to(DEVICE))
        rows = (codes.float() * scale[:, None]).cpu()
        assert rows[0].isfinite().all()
        assert INTERPRETED and bad != bad or rows[1].isnan().any()

    def test_weight_of_every_code_and_scale(self):
        packed, scale = every_value(64)
        mixed = scale[torch.randperm(254)][:, torch.arange(4)]
        mixed[:, 1] = scale[torch.randperm(254), 0]
        for scales in (scale, mixed):
            expected = nvfp4_to_fp8_reference(packed, scales)
            same_codes(portable.nvfp4_to_fp8(*on_device(packed, scales)), expected)
            got = portable.nvfp4_through_fp8(*on_device(packed, scales))
            assert same_bits(got, through_fp8(*expected, torch.bfloat16))

    @pytest.mark.parametrize("n, k", [(1, 16), (33, 80), (130, 1040)])
    def test_weight_of_other_shapes(self, n, k):
        packed, scale = random_weight(n, k)
        same_codes(portable.nvfp4_to_fp8(*on_device(packed, scale)), nvfp4_to_fp8_reference(packed, scale))

    def test_opcheck(self):
        x = torch.randn(3, 64, device=DEVICE)
        packed, scale = on_device(*random_weight(33, 64))
        ops, checks = torch.ops.qerl_portable, ("test_schema", "test_faketensor")
        library.opcheck(ops.nvfp4_through_fp8, (packed, scale), test_utils=checks)
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [*ops.fp8_quantize(mode.from_tensor(x)), *ops.nvfp4_to_fp8(*map(mode.from_tensor, (packed, scale)))]
        for a, b in zip(fake, [*ops.fp8_quantize(x), *ops.nvfp4_to_fp8(packed, scale)], strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype

    def test_refuses(self):
        packed, scale = on_device(*random_weight(32, 64))
        weight, channel = portable.nvfp4_to_fp8(packed, scale)
        x = torch.randn(3, 64, device=DEVICE).bfloat16()
        cases = [
            (r"\[M, K\]", lambda: portable.fp8_quantize(x[0])),
            ("need scales of shape", lambda: portable.nvfp4_to_fp8(packed, scale[:-1])),
            (r"bfloat16 \[\.\.\., 64\]", lambda: portable.fp8_gemm(x.float(), weight, channel, 1.0)),
            ("float8_e4m3fn", lambda: portable.fp8_gemm(x, packed.repeat(1, 2), channel, 1.0)),
            ("weight_scale", lambda: portable.fp8_gemm(x, weight, channel[:-1], 1.0)),
        ]
        for message, attempt in cases:
            with pytest.raises(ValueError, match=message):
                attempt()
        assert portable.fp8_gemm(x[:0], weight, channel, 1.0).shape == (0, 32)

    @pytest.mark.skipif(DEVICE != "cuda", reason="FP8 tensor cores need a GPU")
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("m, n, k", [(1, 48, 64), (7, 640, 512), (64, 3584, 18944), (1000, 4608, 3584)])
    def test_gemm(self, m, n, k, bias):
        if reason := portable.fp8_availability():
            pytest.skip(reason)
        x, packed, scale, b, *_ = on_device(*arguments(m, n, k, torch.bfloat16, bias, 0, (0x28, 0x40)))
        weight, channel = portable.nvfp4_to_fp8(packed, scale)
        y = portable.fp8_gemm(x, weight, channel, ALPHA, b)
        expected = nvfp4_fp8_linear_reference(x.double(), weight, channel, ALPHA, b)
        # one rounding to bfloat16; FP8 tensor cores align the products of 32 columns to about 14 bits
        assert (y.double() - expected).norm() <= 2**-8 * expected.norm()
        assert torch.equal(y, portable.fp8_gemm(x, weight, channel, ALPHA, b))


# --------------------------------------------------------------------------------------------------------- ops
class TestOps:
    def test_available(self):
        assert portable.availability() is None and portable.is_available()

    @pytest.mark.parametrize("lora", [False, True])
    def test_opcheck(self, lora):
        x, packed, scale, bias, u, lora_b = on_device(*arguments(3, 33, 64, torch.bfloat16, rank=16))
        ops, checks = torch.ops.qerl_portable, ("test_schema", "test_faketensor")
        last = (bias, u, lora_b) if lora else ()
        library.opcheck(ops.nvfp4_gemm, (x, packed, scale, ALPHA, *last), test_utils=checks)
        library.opcheck(ops.nvfp4_gemm, (x.view(1, 3, 64), packed, scale, ALPHA), test_utils=checks)
        for transposed in (False, True):
            library.opcheck(ops.nvfp4_dequantize, (packed, scale, torch.float16, transposed), test_utils=checks)
        weight = torch.randn(5, 32, device=DEVICE)
        one = torch.ones(1, device=DEVICE)
        fake = library.opcheck(ops.nvfp4_quantize, (weight, one), test_utils=("test_schema",))
        assert set(fake.values()) == {"SUCCESS"}
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            got = ops.nvfp4_quantize(mode.from_tensor(weight), mode.from_tensor(one))
        for a, b in zip(got, ops.nvfp4_quantize(weight, one)):
            assert a.shape == b.shape and a.dtype == b.dtype and a.device == b.device

    def test_compiled(self):
        """One graph, for any number of tokens, without a break."""
        x, packed, scale, bias, u, lora_b = on_device(*arguments(6, 33, 64, torch.bfloat16, rank=16))

        def layer(x, u):
            return portable.gemm(x * 2, packed, scale, ALPHA, bias, u, lora_b) + 1

        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        for m in (6, 2):
            assert torch.equal(compiled(x[:m], u[:m]), layer(x[:m], u[:m]))

    @pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
    def test_cuda_graph(self):
        for m in (3, 600):
            x, packed, scale, bias, u, lora_b = on_device(*arguments(m, 40, 2048, torch.bfloat16))
            expected = portable.gemm(x, packed, scale, ALPHA, bias, u, lora_b)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = portable.gemm(x, packed, scale, ALPHA, bias, u, lora_b)
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)

    def test_refuses(self):
        x, packed, scale, bias, u, lora_b = on_device(*arguments(3, 32, 64, torch.bfloat16, rank=16))
        cases = [
            ("bfloat16 or float16", lambda: portable.gemm(x.float(), packed, scale, ALPHA)),
            (r"\[\.\.\., 64\]", lambda: portable.gemm(x[:, :32], packed, scale, ALPHA)),
            ("multiple of 64", lambda: portable.gemm(x[:, :32], packed[:, :16], scale[:, :2], ALPHA)),
            ("need scales of shape", lambda: portable.gemm(x, packed, scale[:-1], ALPHA)),
            ("bias has to be", lambda: portable.gemm(x, packed, scale, ALPHA, bias[:-1])),
            ("together", lambda: portable.gemm(x, packed, scale, ALPHA, bias, u)),
            ("multiple of 16", lambda: portable.gemm(x, packed, scale, ALPHA, None, u[:, :8], lora_b[:, :8])),
            ("as x is", lambda: portable.gemm(x, packed, scale, ALPHA, None, u.half(), lora_b)),
            ("uint8", lambda: portable.dequantize(packed.int(), scale)),
            ("same bytes", lambda: portable.dequantize(packed, scale.float())),
            ("bfloat16 or float16", lambda: portable.dequantize(packed, scale, torch.float32)),
            ("multiple of 16", lambda: portable.quantize(x[:, :24], torch.ones(1, device=DEVICE))),
            ("one float32", lambda: portable.quantize(x, torch.ones(2, device=DEVICE))),
            ("float32, bfloat16 or", lambda: portable.quantize(x.double(), torch.ones(1, device=DEVICE))),
        ]
        for message, attempt in cases:
            with pytest.raises(ValueError, match=message):
                attempt()


# ----------------------------------------------------------------------------------------------------- compile
CAPABILITIES = (80, slow(90), slow(120))  # 8.6 and 8.9 get the code of 8.0, in the shared memory of 12.0
SHARED_MEMORY = {80: 163, 90: 227, 120: 99}
"""KiB that a thread block can have."""


def compile_kernel(kernel, types, constants, capability, **options):
    """Through ptxas, for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if types.get(n, "")[:1] == "*"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", CAPABILITIES)
class TestCompile:
    @pytest.mark.parametrize("dtype, tiles", [("bf16", "TILES"), ("fp16", "TILES"), slow("bf16", "MORE_TILES")])
    def test_gemm(self, capability, dtype, tiles):
        import triton.language as tl

        from qerl_verl.kernels.portable import tuning
        from qerl_verl.kernels.portable.nvfp4_gemm import nvfp4_gemm_kernel

        x, integers = f"*{dtype}", dict.fromkeys(("m", "n", "k", "k_64", "rank", "steps"), "i32")
        types = dict(x=x, packed="*u8", scale="*u8", alpha="fp32", **integers)
        dot = tl.bfloat16 if dtype == "bf16" else tl.float16
        chosen = [tile[-5:] for tile in getattr(tuning, tiles)]
        for block_m, block_n, block_k, warps, stages in chosen[:1] if dtype == "fp16" else chosen:
            blocks = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=32, DOT=dot)
            for more, constants in (
                (dict(bias=x, u=x, lora_b=x, out=x), blocks),
                (dict(out="*fp32"), dict(blocks, bias=None, u=None, lora_b=None)),
            ):
                compiled = compile_kernel(
                    nvfp4_gemm_kernel, types | more, constants, capability, num_warps=warps, num_stages=stages
                )
                assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
                assert ".ftz" not in compiled.asm["ptx"]  # subnormal numbers count
                assert "mma" in compiled.asm["ptx"]

    @pytest.mark.parametrize("dtype", ["bf16", slow("fp16")])
    def test_experts(self, capability, dtype):
        import triton.language as tl

        from qerl_verl.kernels.portable import nvfp4_experts

        x, integers = f"*{dtype}", dict.fromkeys(("n", "k_64", "top_k"), "i32")
        types = dict(x=x, packed="*u8", scale="*u8", alpha="*fp32", order="*i32", bounds="*i32", weights="*fp32", out=x)
        dot = tl.bfloat16 if dtype == "bf16" else tl.float16
        for _, block_m, block_n, block_k, warps, stages in nvfp4_experts.TILES:
            for gated in (True, False):
                blocks = dict(GATED=gated, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, DOT=dot)
                kernel, options = nvfp4_experts.grouped_gemm_kernel, dict(num_warps=warps, num_stages=stages)
                compiled = compile_kernel(kernel, types | integers, blocks, capability, **options)
                assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
                assert "mma" in compiled.asm["ptx"]
        compile_kernel(
            nvfp4_experts.sort_choices_kernel,
            dict(chosen="*i32", order="*i32", bounds="*i32", count="i32"),
            dict(BLOCK=nvfp4_experts.SORT_BLOCK),
            capability,
        )
        compile_kernel(
            nvfp4_experts.sum_choices_kernel,
            dict(rows=x, chosen="*i32", out=x, n="i32", top_k="i32"),
            dict(BLOCK=nvfp4_experts.SUM_BLOCK),
            capability,
        )

    def test_others(self, capability):
        from qerl_verl.kernels.portable import nvfp4_dequantize, nvfp4_gemm, nvfp4_quantize

        sources = [
            compile_kernel(
                nvfp4_gemm.nvfp4_gemm_reduce_kernel,
                dict(parts="*fp32", bias="*bf16", out="*bf16", n="i32", count="i32"),
                dict(SPLIT=3, BLOCK=nvfp4_gemm.REDUCE_BLOCK),
                capability,
            )
        ]
        for transposed in (False, True):
            integers = dict.fromkeys(("n", "half_k", "groups", "stride_n", "stride_k"), "i32")
            sources.append(
                compile_kernel(
                    nvfp4_dequantize.nvfp4_dequantize_kernel,
                    dict(packed="*u8", scale="*u8", out="*bf16", factor="fp32", **integers),
                    dict(BLOCK_N=32, BLOCK_GROUPS=8, TRANSPOSED=transposed),
                    capability,
                )
            )
        for dtype in ("bf16", "fp16", "fp32"):
            sources.append(
                compile_kernel(
                    nvfp4_quantize.nvfp4_quantize_kernel,
                    dict(weight=f"*{dtype}", global_scale="*fp32", packed="*u8", scale="*u8", count="i32"),
                    dict(BLOCKS=nvfp4_quantize.BLOCKS),
                    capability,
                )
            )
            assert "div.rn.f32" in sources[-1].asm["ptx"] and "div.full" not in sources[-1].asm["ptx"]
        assert all(".ftz" not in s.asm["ptx"] for s in sources)

    def test_fp8(self, capability):
        from qerl_verl.kernels.portable import fp8

        native = capability >= 89
        rows = compile_kernel(
            fp8.fp8_quantize_rows_kernel,
            dict(x="*bf16", out="*u8", scale="*fp32", k="i32", stride="i32", factor="fp32"),
            dict(BLOCK_K=4096, NATIVE=native),
            capability,
        )
        weights = [
            compile_kernel(
                fp8.nvfp4_to_fp8_kernel,
                dict(packed="*u8", block_scale="*u8", channel_scale="*fp32", out=out)
                | dict.fromkeys(("n", "half_k", "groups"), "i32"),
                dict(BLOCK_N=fp8.BLOCK_N, BLOCK_GROUPS=fp8.BLOCK_GROUPS, NATIVE=native),
                capability,
            )
            for out in ("*u8", "*bf16")
        ]
        compile_kernel(
            fp8.nvfp4_channel_scale_kernel,
            dict(block_scale="*u8", out="*fp32", n="i32", groups="i32"),
            dict(BLOCK_N=fp8.SCALE_ROWS, BLOCK_GROUPS=256),
            capability,
        )
        for compiled in (rows, *weights):
            assert ("cvt.rn.satfinite.e4m3x2.f32" in compiled.asm["ptx"]) is native
            assert ".ftz" not in compiled.asm["ptx"]
