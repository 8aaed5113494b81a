"""The Hopper kernels: layout and decoding in plain Python, and the kernels themselves against
float64."""

from __future__ import annotations

import math

import pytest
import torch

from qerl_verl.kernels import hopper
from qerl_verl.kernels.hopper import build, launch, layout, tuning
from qerl_verl.kernels.nvfp4_dequantize import E2M1_VALUES, block_values_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight

UNAVAILABLE = hopper.unsupported_device()
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))]
GLOBAL_SCALE = 640.0
MAX_ERROR = 2.6e-3


def random_weight(n, k, device="cpu", scales=(1, 127)):
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    scale = torch.randint(*scales, (n, k // 16), dtype=torch.uint8)
    return packed.to(device), scale.to(device)


# ------------------------------------------------------------------------------------------- layout
def test_prepack_keeps_sizes_and_unpack_inverts_it():
    packed, scale = random_weight(192, 384)
    packed_p, scale_p = hopper.prepack(packed, scale)
    assert packed_p.shape == packed.shape and scale_p.shape == scale.shape
    assert not torch.equal(packed_p, packed)
    back, scale_back = hopper.unpack(packed_p, scale_p)
    assert torch.equal(back, packed) and torch.equal(scale_back, scale)


def test_prepack_keeps_no_tensor_on_a_device():
    """A cached one would lie in the engine's memory and be lost when that sleeps at level 2."""
    hopper.unpack(*hopper.prepack(*random_weight(64, 64)))
    assert all(table.device.type == "cpu" for table in layout._scale_tables())


def test_prepack_takes_both_scale_dtypes():
    packed, scale = random_weight(64, 128)
    for a, b in zip(hopper.prepack(packed, scale), hopper.prepack(packed, scale.view(torch.float8_e4m3fn))):
        assert torch.equal(a, b)


def test_prepack_keeps_values_of_negative_and_zero_scales():
    packed, scale = random_weight(64, 128)
    scale = scale | torch.where(torch.rand(scale.shape) < 0.3, 0x80, 0).to(torch.uint8)
    scale[torch.rand(scale.shape) < 0.2] = 0
    expected = block_values_nvfp4(packed, scale, torch.float64)
    got = block_values_nvfp4(*hopper.unpack(*hopper.prepack(packed, scale)), torch.float64)
    assert torch.equal(got, expected)


def test_prepack_refuses_what_it_does_not_cover():
    with pytest.raises(ValueError, match="multiples of 64"):
        hopper.prepack(*random_weight(96, 128))
    with pytest.raises(ValueError, match="belong to"):
        hopper.prepack(random_weight(64, 128)[0], random_weight(64, 256)[1])
    packed, scale = random_weight(64, 128)
    scale[3, 5] = 0x7F
    with pytest.raises(ValueError, match="NaN"):
        hopper.prepack(packed, scale)


def bf16(bits):
    return (bits << 16).to(torch.int64).to(torch.int32).view(torch.float32).double()


@pytest.mark.parametrize("place", range(8))
def test_decoding_is_exact_for_every_code_and_scale(place):
    """``decode8`` of nvfp4_format.cuh, step by step, for code number ``place`` of a word."""
    scales = torch.arange(127, dtype=torch.uint8)
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
    code = torch.arange(16).repeat_interleave(127)
    scale = scales.repeat(16)
    word = torch.zeros(code.numel(), dtype=torch.int64)
    others = torch.randint(0, 16, (8,))
    for i, code_bit, word_bit in layout.word_bits():
        source = code if i == place else others[i]
        word |= ((source >> code_bit) & 1) << word_bit
    rotated = [(word >> r | word << (32 - r)) & 0xFFFFFFFF for r in (0, 4, 6)]
    pairs = (
        (word << 6) & 0x81C081C0,
        rotated[1] & 0x81C081C0,
        (word << 2) & 0x00400040 | rotated[2] & 0x81808180,
        rotated[0] & 0x81C081C0,
    )
    code_bits = (pairs[place // 2] >> 16 * (place % 2)) & 0xFFFF
    to_code, back = layout._scale_tables()
    scale_bits = to_code[scale.int()].long() * 16 + 0x6F80
    product = bf16(code_bits) * bf16(scale_bits)
    expected = values[code] * scale.view(torch.float8_e4m3fn).double()
    nonzero = scale != 0  # prepack makes the codes of a zero scale zero
    assert torch.equal(product[nonzero] * 128, expected[nonzero])
    assert (product[code % 8 == 0] == 0).all()
    assert torch.equal(product.to(torch.bfloat16).double(), product)
    assert torch.equal(back[to_code[scales.int()].int()], scales)


def test_plans_cover_every_shape():
    for m in (1, 7, 16, 33, 64, 100, 128, 200, 256, 300, 512, 513, 8192):
        for n, k in ((64, 128), (192, 512), (4608, 3584), (37888, 3584), (3584, 18944), (64, 64)):
            plan = tuning.choose(m, n, k, 132)
            if plan.config >= 0:
                assert k % (64 * tuning.CONFIGS[plan.config].k_units) == 0
                assert 1 <= plan.blocks <= tuning.tiles(plan.config, m, n) * tuning.steps(plan.config, k)


def test_fake_implementations():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        packed, scale = torch.empty(128, 64, dtype=torch.uint8), torch.empty(128, 8, dtype=torch.uint8)
        y = torch.ops.qerl_hopper.nvfp4_gemm(torch.empty(2, 3, 128, dtype=torch.bfloat16), packed, scale, 1.0)
        w = torch.ops.qerl_hopper.nvfp4_block_values(packed, scale)
    assert y.shape == (2, 3, 128) and y.dtype == torch.bfloat16
    assert w.shape == (128, 128) and w.dtype == torch.bfloat16


def test_prepack_lora_b_and_back():
    for n, rank in ((64, 16), (320, 32), (1152, 48)):
        b = torch.randn(n, rank).bfloat16()
        packed = hopper.prepack_lora_b(b)
        assert packed.shape == b.shape and not torch.equal(packed, b)
        assert torch.equal(hopper.unpack_lora_b(packed), b)
    with pytest.raises(ValueError, match="multiple of 16"):
        hopper.prepack_lora_b(torch.zeros(64, 8))


def test_unsupported_adapter():
    assert hopper.unsupported_adapter(1152, 896, 32, [896, 1024, 1152]) is None
    assert hopper.unsupported_adapter(64, 64, 16, [64]) is None
    assert "multiple of 16" in hopper.unsupported_adapter(256, 64, 8, [256])
    assert "multiples of 128" in hopper.unsupported_adapter(256, 64, 16, [192, 256])
    assert "end at row 256" in hopper.unsupported_adapter(256, 64, 16, [128])


def test_no_tile_lies_across_two_projections():
    for n, ends in ((1152, (896, 1024, 1152)), (4608, (3584, 4096, 4608)), (9728, (4864, 9728))):
        align = math.gcd(*(e // 64 for e in ends))
        for m in (1, 9, 17, 40, 100, 200, 3000, 9000):
            chosen = tuning.choose(m, n, 896, 132, align)
            assert chosen.config >= 0 and align % tuning.CONFIGS[chosen.config].row_units == 0
            assert 896 % (64 * tuning.CONFIGS[chosen.config].k_units) == 0


# ------------------------------------------------------------------------------------------ kernels
class TestOnHopper:
    pytestmark = on_hopper

    @staticmethod
    def case(m, n, k, seed=0, bias=False):
        torch.manual_seed(seed)
        packed, scale = random_weight(n, k, "cuda", scales=(0x20, 0x7F))
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        b = torch.randn(n, device="cuda", dtype=torch.bfloat16) if bias else None
        expected = x.double() @ block_values_nvfp4(packed, scale, torch.float64).t() / GLOBAL_SCALE
        if bias:
            expected += b.double()
        return x, PackedWeight(*hopper.prepack(packed, scale), GLOBAL_SCALE), b, expected

    @staticmethod
    def error(got, expected):
        assert got.isfinite().all()
        return ((got.double() - expected).norm() / expected.norm()).item()

    def test_library_and_table_agree(self):
        import ctypes

        library = build.load_library()
        assert library.qerl_nvfp4_config_count() == len(tuning.CONFIGS)
        for i, config in enumerate(tuning.CONFIGS):
            out = (ctypes.c_int * 7)()
            library.qerl_nvfp4_config(i, out)
            assert tuple(out) == tuple(config)

    @pytest.mark.parametrize("n,k", [(64, 64), (192, 1024), (4608, 3584)])
    def test_block_values_are_exact(self, n, k):
        packed, scale = random_weight(n, k, "cuda")
        got = hopper.block_values(*hopper.prepack(packed, scale))
        assert torch.equal(got, block_values_nvfp4(packed, scale, torch.bfloat16))

    @pytest.mark.parametrize("config", range(len(tuning.CONFIGS)))
    @pytest.mark.parametrize("blocks", [1, 3, 7, 132, 264])
    def test_every_configuration(self, config, blocks):
        n, k = 64 * 11, 256 * 5  # rows that fill no tile of several units
        for m in (1, 13, 200):
            x, weight, bias, expected = self.case(m, n, k, bias=True)
            plan = tuning.plan(config, blocks, m, n, k)
            for _ in range(2):  # the second finds the counters as the first left them
                out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
                y = launch.run_plan(x, weight, bias, plan, out=out)
                assert self.error(y, expected) < MAX_ERROR

    @pytest.mark.parametrize("config", range(len(tuning.CONFIGS)))
    @pytest.mark.parametrize("cluster", [2, 3, 5, 8])
    def test_every_configuration_with_clusters(self, config, cluster):
        n, k = 64 * 11, 256 * 9
        for m in (1, 13, 200):
            x, weight, bias, expected = self.case(m, n, k, bias=True)
            plan = tuning.plan(config, 0, m, n, k, cluster)
            out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
            y = launch.run_plan(x, weight, bias, plan, out=out)
            assert self.error(y, expected) < MAX_ERROR

    @pytest.mark.parametrize("m", [1, 3, 8, 16, 24, 32, 64, 100, 128, 256, 384, 640, 1024])
    def test_chosen_kernel(self, m):
        x, weight, bias, expected = self.case(m, 1152, 1792, bias=m % 2 == 1)
        assert self.error(hopper.gemm(x, weight, bias), expected) < MAX_ERROR

    @staticmethod
    def lora_case(m, n, k, rank, ends, seed=3):
        torch.manual_seed(seed)
        a = torch.randn(len(ends) * rank, k, device="cuda", dtype=torch.bfloat16) / k**0.5
        b = torch.randn(n, rank, device="cuda", dtype=torch.bfloat16)

        def delta(x, scaling):
            parts, begin = [], 0
            for i, end in enumerate(ends):
                u = x.double() @ a[i * rank : (i + 1) * rank].double().t()
                parts.append(u @ b[begin:end].double().t() * scaling)
                begin = end
            return torch.cat(parts, dim=1)

        return a, hopper.prepack_lora_b(b), delta

    @pytest.mark.parametrize("config", range(len(tuning.CONFIGS)))
    @pytest.mark.parametrize("blocks,cluster", [(3, 0), (132, 0), (264, 0), (0, 3), (0, 8)])
    @pytest.mark.parametrize("rank", [16, 32, 64])
    def test_every_configuration_with_an_adapter(self, config, blocks, cluster, rank):
        n, k, ends = 64 * 12, 256 * 9, (256, 512, 768)
        a, b_p, delta = self.lora_case(1, n, k, rank, ends)
        for m in (1, 13, 200):
            x, weight, bias, expected = self.case(m, n, k, bias=True)
            expected = expected + delta(x, 0.5)
            plan = tuning.plan(config, blocks, m, n, k, cluster)
            for pdl in (1, 0):
                out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
                y = launch.run_plan(x, weight, bias, plan, pdl, out=out, lora=(a, b_p, ends, 0.5))
                assert self.error(y, expected) < MAX_ERROR

    @pytest.mark.parametrize(
        "n,k,ends",
        [(1152, 896, (896, 1024, 1152)), (3584, 3584, (3584,)), (9728, 896, (4864, 9728)), (192, 64, (192,))],
    )
    @pytest.mark.parametrize("m", [1, 8, 33, 128, 300, 1500])
    def test_chosen_kernel_with_an_adapter(self, n, k, ends, m):
        a, b_p, delta = self.lora_case(m, n, k, 32, ends)
        x, weight, bias, expected = self.case(m, n, k, bias=True)
        got = hopper.lora_gemm(x.view(1, m, k), weight, bias, a, b_p, ends, 2.0)
        assert got.shape == (1, m, n)
        assert self.error(got[0], expected + delta(x, 2.0)) < MAX_ERROR

    def test_an_adapter_of_zeros_changes_nothing(self):
        a, b_p, _ = self.lora_case(40, 1024, 1024, 32, (1024,))
        x, weight, bias, _ = self.case(40, 1024, 1024, bias=True)
        got = hopper.lora_gemm(x, weight, bias, a, torch.zeros_like(b_p), (1024,), 1.0)
        assert torch.equal(got, hopper.gemm(x, weight, bias))

    @pytest.mark.parametrize("m", [4, 64, 200])
    def test_a_chain_with_adapters_in_a_cuda_graph(self, m):
        """Shrink and GEMM overlap with each other and with the neighbours; the adapter is
        overwritten in place."""
        n = 3584
        a, b_p, _ = self.lora_case(m, n, n, 32, (n,))
        x, weight, _, _ = self.case(m, n, n, seed=1)
        weight = weight._replace(global_scale=32768.0)

        def chain(x, synchronize=False):
            for _ in range(6):
                x = hopper.lora_gemm(x, weight, None, a, b_p, (n,), 0.1)
                if synchronize:
                    torch.cuda.synchronize()
            return x

        expected = chain(x, synchronize=True)
        assert expected.isfinite().all() and expected.abs().max() > 0
        for _ in range(10):
            assert torch.equal(chain(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(x)
        for _ in range(3):
            graph.replay()
            assert torch.equal(y, expected)
        b_p.mul_(-3.0)
        expected = chain(x, synchronize=True)
        graph.replay()
        assert torch.equal(y, expected)

    def test_an_adapter_that_does_not_fit_is_refused(self):
        a, b_p, _ = self.lora_case(1, 256, 128, 32, (128, 256))
        x, weight, _, _ = self.case(1, 256, 128)
        with pytest.raises(ValueError, match="multiples of 128"):
            hopper.lora_gemm(x, weight, None, a, b_p, (64, 256), 1.0)
        with pytest.raises(ValueError, match="does not fit"):
            hopper.lora_gemm(x, weight, None, a[:, :64], b_p, (128, 256), 1.0)

    def test_small_activations_keep_their_precision(self):
        x, weight, _, expected = self.case(16, 512, 1024)
        got = hopper.gemm(x * 2.0**-60, weight)
        assert self.error(got.double() * 2.0**60, expected) < MAX_ERROR

    def test_result_does_not_depend_on_timing(self):
        for m in (8, 64, 128):
            x, weight, _, _ = self.case(m, 3584, 3584)
            first = hopper.gemm(x, weight)
            for _ in range(20):
                assert torch.equal(hopper.gemm(x, weight), first)

    def test_leading_dimensions_strides_and_no_tokens(self):
        x, weight, _, expected = self.case(12, 256, 512)
        got = hopper.gemm(x.view(3, 4, -1), weight)
        assert got.shape == (3, 4, 256) and self.error(got.view(12, -1), expected) < MAX_ERROR
        wide = torch.zeros(12, 520, device="cuda", dtype=torch.bfloat16)
        wide[:, 3:515] = x
        assert torch.equal(hopper.gemm(wide[:, 3:515], weight), got.view(12, -1))
        assert hopper.gemm(x[:0], weight).shape == (0, 256)

    @pytest.mark.parametrize("m", [4, 64, 200])
    def test_a_launch_waits_for_the_one_before(self, m):
        """Launches overlap (programmatic dependent launch); a chain of GEMMs still sees finished
        inputs."""
        n = 3584
        x, first, _, _ = self.case(m, n, n, seed=1)
        _, second, _, _ = self.case(m, n, n, seed=2)
        weights = [weight._replace(global_scale=32768.0) for weight in (first, second)]

        def chain(x, synchronize=False):
            for weight in weights * 4:
                x = hopper.gemm(x, weight)
                if synchronize:
                    torch.cuda.synchronize()
            return x

        expected = chain(x, synchronize=True)
        assert expected.isfinite().all() and expected.abs().max() > 0
        for _ in range(10):
            assert torch.equal(chain(x), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = chain(x)
        for _ in range(3):
            graph.replay()
            assert torch.equal(y, expected)

    def test_cuda_graph(self):
        x, weight, _, expected = self.case(16, 3584, 3584)
        graph = torch.cuda.CUDAGraph()
        static, copy = torch.zeros_like(x), torch.zeros_like(x)
        with torch.cuda.graph(graph):
            copy.copy_(static)
            y = hopper.gemm(copy, weight)
        for factor in (1.0, -2.0):
            static.copy_(x * factor)
            graph.replay()
            assert self.error(y, expected * factor) < MAX_ERROR
