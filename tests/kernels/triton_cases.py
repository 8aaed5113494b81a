"""The Triton kernels against their references. ``test_triton.py`` runs this file in processes of
its own.

In Triton's interpreter (TRITON_INTERPRET=1) on a CPU, or on a GPU. The group ``compile`` needs
neither. Each table has a part that is not marked slow."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from torch import library

from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_experts import ExpertAdapter, ExpertStack
from qerl_verl.kernels.packed_weight import PackedWeight

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
GLOBAL_SCALE = 640.0


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def random_weight(n, k, scales=(1, 127)):
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    return packed, torch.randint(*scales, (n, k // 16), dtype=torch.uint8)


def every_value(k):
    """Returns 254 rows, one for each finite E4M3 byte, with all sixteen E2M1 codes in low and in
    high nibbles."""
    code = torch.arange(16, dtype=torch.uint8)
    both = torch.cat((code | code.flip(0) << 4, code << 4 | code.flip(0)))  # 64 input channels
    scale = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8)
    return both.repeat(254, k // 64), scale[:, None].repeat(1, k // 16)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.cpu().contiguous().view(torch.int16), b.contiguous().view(torch.int16))


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


# ------------------------------------------------------------------------------------- block values
class TestBlockValues:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_code_and_scale(self, dtype):
        packed, scale = every_value(64)
        expected = block_values_nvfp4(packed, scale, dtype)
        got = triton_kernels.block_values(*on_device(packed, scale), dtype)
        assert got.is_contiguous()
        assert same_bits(got, expected)  # signs of zeros, too

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("n, k", [(1, 16), (3, 48), (33, 80), (37, 64), (64, 128), (129, 272)])
    def test_shapes(self, dtype, n, k):
        packed, scale = random_weight(n, k)
        expected = block_values_nvfp4(packed, scale, dtype)
        got = triton_kernels.block_values(*on_device(packed, scale.view(torch.float8_e4m3fn)), dtype)
        assert same_bits(got, expected)

    def test_power_of_two_factor(self):
        from qerl_verl.kernels.triton.nvfp4_block_values import nvfp4_block_values
        from qerl_verl.kernels.triton.nvfp4_gemm import FLOAT16_FACTOR

        packed, scale = every_value(64)
        got = nvfp4_block_values(*on_device(packed, scale), torch.float16, factor=FLOAT16_FACTOR)
        expected = block_values_nvfp4(packed, scale, torch.float64) * FLOAT16_FACTOR
        assert torch.equal(got.cpu().double(), expected)

    def test_not_contiguous(self):
        packed, scale = random_weight(32, 128)
        expected = block_values_nvfp4(packed[::2, 8:40], scale[::2, 1:5], torch.bfloat16)
        packed, scale = on_device(packed, scale)
        assert same_bits(triton_kernels.block_values(packed[::2, 8:40], scale[::2, 1:5]), expected)

    def test_empty(self):
        assert triton_kernels.block_values(*on_device(*random_weight(0, 64))).shape == (0, 64)


# --------------------------------------------------------------------------------------------- gemm
def check_gemm(x, packed, scale, bias, u, lora_b, y):
    """Compares with float64: half a step of the output, and float32 sums. More where a 16-bit
    result is added to."""
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], packed.shape[0])
    weight = block_values_nvfp4(packed, scale, torch.float64)
    expected = x.double() @ weight.t() / GLOBAL_SCALE
    size = x.double().abs() @ weight.abs().t() / GLOBAL_SCALE
    if u is not None:
        expected = expected + u.double() @ lora_b.double().t()
        size = size + u.double().abs() @ lora_b.double().abs().t()
    if bias is not None:
        expected = expected + bias.double()
    error = (y.cpu().double() - expected).abs()
    eps = torch.finfo(x.dtype).eps
    if triton_kernels.choose(x.numel() // x.shape[-1], *weight.shape).path == "decode first":
        assert error.norm() <= 0.75 * eps * expected.norm()
    else:
        assert (error <= 0.501 * eps * expected.abs() + 2e-6 * size + 1e-7).all(), error.max()


def arguments(m, n, k, dtype, bias=True, rank=32, scales=(1, 127)):
    packed, scale = random_weight(n, k, scales)
    u, lora_b = (torch.randn(m, rank).to(dtype), torch.randn(n, rank).to(dtype)) if rank else (None, None)
    return torch.randn(m, k).to(dtype), packed, scale, torch.randn(n).to(dtype) if bias else None, u, lora_b


def call(x, packed, scale, bias, u, lora_b):
    x, packed, scale, bias, u, lora_b = on_device(x, packed, scale, bias, u, lora_b)
    return triton_kernels.gemm(x, PackedWeight(packed, scale, GLOBAL_SCALE), bias, u, lora_b)


class TestGemm:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias, rank", [(False, 0), (True, 0), (False, 16), (True, 48), (True, 64)])
    @pytest.mark.parametrize(
        "m, n, k", [(1, 130, 64), slow(3, 65, 192), slow(17, 64, 512), (33, 7, 128), slow(129, 200, 64)]
    )
    def test_gemm(self, dtype, bias, rank, m, n, k):
        args = arguments(m, n, k, dtype, bias, rank)
        check_gemm(*args, call(*args))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias, rank", [(False, 0), (True, 32)])
    def test_many_tokens(self, dtype, bias, rank):
        args = arguments(513, 33, 128, dtype, bias, rank)
        assert triton_kernels.choose(513, 33, 128).path == "decode first"
        check_gemm(*args, call(*args))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_code_and_scale(self, dtype):
        """The GEMM with the identity is the weight itself."""
        packed, scale = every_value(64)
        y = triton_kernels.gemm(torch.eye(64, dtype=dtype, device=DEVICE), PackedWeight(*on_device(packed, scale), 1.0))
        assert torch.equal(y.cpu(), block_values_nvfp4(packed, scale, dtype).t())

    def test_every_input_channel(self):
        packed, scale = random_weight(70, 320)
        for plan_k in (64, 320):  # one tile, and several
            y = triton_kernels.gemm(
                torch.eye(320, dtype=torch.bfloat16, device=DEVICE)[:, :plan_k],
                PackedWeight(*on_device(packed[:, : plan_k // 2], scale[:, : plan_k // 16]), 1.0),
            )
            expected = block_values_nvfp4(packed, scale, torch.bfloat16).t()
            assert torch.equal(y.cpu()[:plan_k], expected[:plan_k])

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("split", [1, 2, 3, 8])
    def test_split(self, dtype, split):
        """Parts of equal and unequal length, with bias and LoRA added once; the same bits each
        time."""
        from qerl_verl.kernels.triton.nvfp4_gemm import run_plan

        args = arguments(5, 67, 512, dtype, rank=16)
        x, packed, scale, bias, u, lora_b = on_device(*args)
        plan = triton_kernels.Plan("fused", 16, 64, 64, split, 4, 3)
        weight = PackedWeight(packed, scale, GLOBAL_SCALE)
        y = run_plan(x, weight, bias, u, lora_b, plan)
        check_gemm(*args, y)
        assert torch.equal(y, run_plan(x, weight, bias, u, lora_b, plan))

    @pytest.mark.parametrize("m", [1, 20, 40, 70])
    def test_every_tile(self, m):
        args = arguments(m, 129, 256, torch.bfloat16)
        check_gemm(*args, call(*args))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
    def test_every_tile_that_is_measured(self, dtype):
        from qerl_verl.kernels.triton import tuning
        from qerl_verl.kernels.triton.nvfp4_gemm import run_plan

        args = arguments(19, 130, 256, dtype, rank=16)
        for tile in tuning.MORE_TILES:
            block_m, block_n, block_k, warps, stages = tile
            plan = triton_kernels.Plan("fused", block_m, block_n, block_k, 2, warps, stages)
            x, packed, scale, *rest = on_device(*args)
            check_gemm(*args, run_plan(x, PackedWeight(packed, scale, GLOBAL_SCALE), *rest, plan))

    def test_chosen_split(self):
        args = arguments(4, 40, 2048, torch.bfloat16)
        assert triton_kernels.choose(4, 40, 2048).split_k > 1
        check_gemm(*args, call(*args))

    def test_negative_scales(self):
        packed, scale = random_weight(64, 128)
        scale = scale | torch.where(torch.rand(scale.shape) < 0.5, 0x80, 0).to(torch.uint8)
        args = torch.randn(3, 128).bfloat16(), packed, scale, None, None, None
        check_gemm(*args, call(*args))

    def test_leading_dimensions_and_strides(self):
        x, packed, scale, bias, u, lora_b = arguments(12, 32, 64, torch.bfloat16)
        x = torch.cat((x, x), -1).view(3, 4, 128)[..., 1:65]  # neither contiguous nor aligned
        u = u.view(3, 4, -1)
        check_gemm(x, packed, scale, bias, u, lora_b, call(x, packed, scale, bias, u, lora_b))

    def test_no_tokens(self):
        args = arguments(0, 32, 64, torch.bfloat16)
        assert call(*args).shape == (0, 32)


# ------------------------------------------------------------------------------------------ experts
ADAPTER_TENSORS = ("gate_up_a", "gate_up_b", "down_a", "down_b")


def make_experts(count, hidden, inner):
    """Returns random experts, gate and up before down; the factors differ by expert."""
    stacks = []
    for n, k in ((2 * inner, hidden), (hidden, inner)):
        packed, scale = random_weight(count * n, k, (0x28, 0x40))
        factors = torch.rand(count) * 0.05 / k**0.5 + 0.01
        stacks.append(ExpertStack(packed.view(count, n, -1), scale.view(count, n, -1), factors))
    return stacks


def make_adapter(count, hidden, inner, rank, dtype):
    """Returns a random adapter whose deltas are as large as the experts' own outputs."""
    adapter = ExpertAdapter.zeros(count, hidden, inner, rank, 0.7, dtype, "cpu")
    for factor, size in ((adapter.gate_up_a, 1), (adapter.gate_up_b, 1), (adapter.down_a, 1), (adapter.down_b, 1)):
        factor.copy_(torch.randn(factor.shape) * size / factor.shape[-1] ** 0.5)
    return adapter


class TestExperts:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
    @pytest.mark.parametrize("tokens, rank", [(5, 16), slow(1, 32), slow(70, 128)])
    def test_an_adapter(self, dtype, tokens, rank):
        """On every expert, one of which has no tokens, and some choices are another rank's."""
        from qerl_verl.kernels.nvfp4_experts import nvfp4_experts_reference

        count, hidden, inner = 3, 128, 64
        stacks, adapter = make_experts(count, hidden, inner), make_adapter(count, hidden, inner, rank, dtype)
        x, logits = torch.randn(tokens, hidden).to(dtype), torch.randn(tokens, count)
        logits[:, 1] = -9.0
        weights, chosen = logits.softmax(-1).topk(2)
        chosen[::2, 0] = -1
        wide = replace(adapter, **{f: getattr(adapter, f).double() for f in ADAPTER_TENSORS})
        exact = nvfp4_experts_reference(x.double(), weights, chosen, *stacks, wide)
        without = nvfp4_experts_reference(x.double(), weights, chosen, *stacks)
        assert (exact - without).norm() > 0.1 * exact.norm()
        stacks = [ExpertStack(*on_device(s.packed, s.scale, s.factors)) for s in stacks]
        adapter = replace(adapter, **{f: on_device(getattr(adapter, f))[0] for f in ADAPTER_TENSORS})
        got = triton_kernels.experts(*on_device(x, weights, chosen), *stacks, adapter)
        error = (got.cpu().double() - exact).norm() / exact.norm()
        assert error < 3 * torch.finfo(dtype).eps, error
        triton_kernels.warm_up_experts(*stacks, 2, dtype, adapter)
        zero = replace(adapter, **{f: torch.zeros_like(getattr(adapter, f)) for f in ADAPTER_TENSORS})
        got = [triton_kernels.experts(*on_device(x, weights, chosen), *stacks, a) for a in (zero, None)]
        assert torch.equal(*got)

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
        """Within the roundings between the GEMMs; one expert has no tokens, and with
        ``other_ranks`` some choices are another rank's."""
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
        place = lambda s: ExpertStack(*on_device(s.packed, s.scale, s.factors))  # noqa: E731
        got = triton_kernels.experts(*on_device(x, weights, chosen), place(gate_up), place(down))
        assert got.dtype == dtype and got.shape == x.shape
        error = (got.cpu().double() - exact).norm() / exact.norm()
        assert error < 2 * torch.finfo(dtype).eps, error
        none = triton_kernels.experts(*on_device(x, weights, torch.full_like(chosen, -1)), place(gate_up), place(down))
        assert not none.any()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16)])
    def test_every_tile(self, dtype):
        """The same within roundings, whatever the tile; what is warmed up is what is launched."""
        from qerl_verl.kernels.triton.nvfp4_experts import TILES, choose_tile, nvfp4_experts

        stacks = [ExpertStack(*on_device(s.packed, s.scale, s.factors)) for s in make_experts(3, 128, 128)]
        x = torch.randn(19, 128, device=DEVICE).to(dtype)
        weights, chosen = torch.randn(19, 3, device=DEVICE).softmax(-1).topk(2)
        triton_kernels.warm_up_experts(*stacks, 2, dtype)
        found = [nvfp4_experts(x, weights, chosen, *stacks, tile=tile).double() for _, *tile in TILES]
        for other in found[1:]:
            assert (other - found[0]).norm() < torch.finfo(dtype).eps * found[0].norm()
        limits = [limit for limit, *_ in TILES]
        assert [choose_tile(rows * 4, 4) for rows in (limits[0], limits[1], limits[1] + 1)] == [
            tuple(t) for _, *t in TILES
        ]

    def test_no_tokens(self):
        stacks = [ExpertStack(*on_device(s.packed, s.scale, s.factors)) for s in make_experts(2, 64, 64)]
        empty = torch.zeros(0, 2, device=DEVICE)
        out = triton_kernels.experts(torch.zeros(0, 64, device=DEVICE).bfloat16(), empty, empty.int(), *stacks)
        assert out.shape == (0, 64)

    def test_refuses(self):
        gate_up, down = (ExpertStack(*on_device(s.packed, s.scale, s.factors)) for s in make_experts(2, 64, 64))
        x, weights = torch.zeros(3, 64, device=DEVICE).bfloat16(), torch.zeros(3, 1, device=DEVICE)
        chosen, apart = weights.int(), torch.stack([down.packed, down.packed], -1)[..., 0]
        adapter = lambda rank, dtype: ExpertAdapter.zeros(2, 64, 64, rank, 1.0, dtype, DEVICE)  # noqa: E731
        adapted = lambda *of: triton_kernels.experts(x, weights, chosen, gate_up, down, adapter(*of))  # noqa: E731
        cases = [
            ("a power of two from 16 on, got", lambda: adapted(8, torch.bfloat16)),
            ("contiguous and torch.bfloat16, as x is", lambda: adapted(16, torch.float32)),
            ("bfloat16 or float16", lambda: triton_kernels.experts(x.float(), weights, chosen, gate_up, down)),
            ("multiple of 64, got 32", lambda: triton_kernels.experts(x[:, :32], weights, chosen, gate_up, down)),
            (r"weights and chosen \[T, k\]", lambda: triton_kernels.experts(x, weights[:2], chosen, gate_up, down)),
            ("need other shapes", lambda: triton_kernels.experts(x, weights, chosen, down, down)),
            (
                "have to be contiguous",
                lambda: triton_kernels.experts(
                    x, weights, chosen, gate_up, ExpertStack(apart, down.scale, down.factors)
                ),
            ),
        ]
        for message, attempt in cases:
            with pytest.raises(ValueError, match=message):
                attempt()


# ---------------------------------------------------------------------------------------------- ops
class TestOps:
    def test_available(self):
        assert triton_kernels.unsupported_device() is None

    @pytest.mark.parametrize("lora", [False, True])
    def test_opcheck(self, lora):
        x, packed, scale, bias, u, lora_b = on_device(*arguments(3, 33, 64, torch.bfloat16, rank=16))
        ops, checks = torch.ops.qerl_triton, ("test_schema", "test_faketensor")
        last = (bias, u, lora_b) if lora else ()
        library.opcheck(ops.nvfp4_gemm, (x, packed, scale, GLOBAL_SCALE, *last), test_utils=checks)
        library.opcheck(ops.nvfp4_gemm, (x.view(1, 3, 64), packed, scale, GLOBAL_SCALE), test_utils=checks)
        library.opcheck(ops.nvfp4_block_values, (packed, scale, torch.float16), test_utils=checks)

    def test_compiled(self):
        """One graph, for any number of tokens, without a break."""
        x, packed, scale, bias, u, lora_b = on_device(*arguments(6, 33, 64, torch.bfloat16, rank=16))

        def layer(x, u):
            return triton_kernels.gemm(x * 2, PackedWeight(packed, scale, GLOBAL_SCALE), bias, u, lora_b) + 1

        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
        for m in (6, 2):
            assert torch.equal(compiled(x[:m], u[:m]), layer(x[:m], u[:m]))

    @pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
    def test_cuda_graph(self):
        for m in (3, 600):
            x, packed, scale, bias, u, lora_b = on_device(*arguments(m, 40, 2048, torch.bfloat16))
            expected = triton_kernels.gemm(x, PackedWeight(packed, scale, GLOBAL_SCALE), bias, u, lora_b)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = triton_kernels.gemm(x, PackedWeight(packed, scale, GLOBAL_SCALE), bias, u, lora_b)
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)

    def test_refuses(self):
        x, packed, scale, bias, u, lora_b = on_device(*arguments(3, 32, 64, torch.bfloat16, rank=16))
        weight = PackedWeight(packed, scale, GLOBAL_SCALE)
        cases = [
            ("bfloat16 or float16", lambda: triton_kernels.gemm(x.float(), weight)),
            (r"\[\.\.\., 64\]", lambda: triton_kernels.gemm(x[:, :32], weight)),
            (
                "multiple of 64",
                lambda: triton_kernels.gemm(x[:, :32], PackedWeight(packed[:, :16], scale[:, :2], GLOBAL_SCALE)),
            ),
            ("need scales of shape", lambda: triton_kernels.gemm(x, weight._replace(scale=scale[:-1]))),
            ("bias has to be", lambda: triton_kernels.gemm(x, weight, bias[:-1])),
            ("together", lambda: triton_kernels.gemm(x, weight, bias, u)),
            ("multiple of 16", lambda: triton_kernels.gemm(x, weight, None, u[:, :8], lora_b[:, :8])),
            ("as x is", lambda: triton_kernels.gemm(x, weight, None, u.half(), lora_b)),
            ("uint8", lambda: triton_kernels.block_values(packed.int(), scale)),
            ("same bytes", lambda: triton_kernels.block_values(packed, scale.float())),
            ("bfloat16 or float16", lambda: triton_kernels.block_values(packed, scale, torch.float32)),
        ]
        for message, attempt in cases:
            with pytest.raises(ValueError, match=message):
                attempt()


# ------------------------------------------------------------------------------------------ compile
# 8.6 and 8.9 get the code of 8.0, in the shared memory of 12.0
CAPABILITIES = (80, slow(90), slow(120))
SHARED_MEMORY = {80: 163, 90: 227, 120: 99}
"""KiB that a thread block can have."""


def compile_kernel(kernel, types, constants, capability, **options):
    """Compiles through ptxas, for a GPU that need not be there."""
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

        from qerl_verl.kernels.triton import tuning
        from qerl_verl.kernels.triton.nvfp4_gemm import nvfp4_gemm_kernel

        x, integers = f"*{dtype}", dict.fromkeys(("m", "n", "k", "k_64", "rank", "steps"), "i32")
        types = dict(x=x, packed="*u8", scale="*u8", inverse_scale="fp32", **integers)
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

        from qerl_verl.kernels.triton import nvfp4_experts

        x, integers = f"*{dtype}", dict.fromkeys(("n", "k_64", "top_k"), "i32")
        types = dict(
            x=x, packed="*u8", scale="*u8", factors="*fp32", order="*i32", bounds="*i32", weights="*fp32", out=x
        )
        types |= dict(u=x, lora_b=x)
        dot = tl.bfloat16 if dtype == "bf16" else tl.float16
        for _, block_m, block_n, block_k, warps, stages in nvfp4_experts.TILES:
            for gated, rank in ((True, 0), (False, 0), (True, 128), (False, 16)):
                blocks = dict(GATED=gated, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, DOT=dot)
                blocks |= dict(RANK=rank, BLOCK_R=min(rank or 16, nvfp4_experts.RANK_BLOCK))
                kernel, options = nvfp4_experts.grouped_gemm_kernel, dict(num_warps=warps, num_stages=stages)
                compiled = compile_kernel(kernel, types | integers, blocks, capability, **options)
                assert compiled.metadata.shared <= SHARED_MEMORY[capability] * 1024
                assert "mma" in compiled.asm["ptx"]
        shrink_m, shrink_r, shrink_k = nvfp4_experts.SHRINK_BLOCKS
        compile_kernel(
            nvfp4_experts.shrink_kernel,
            dict(x=x, lora_a=x, order="*i32", bounds="*i32", u=x, rank="i32", k_64="i32", top_k="i32", scaling="fp32"),
            dict(GATHERED=True, BLOCK_M=shrink_m, BLOCK_R=shrink_r, BLOCK_K=shrink_k, DOT=dot),
            capability,
        )
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
        from qerl_verl.kernels.triton import nvfp4_block_values, nvfp4_gemm

        integers = dict.fromkeys(("n", "half_k", "groups"), "i32")
        sources = [
            compile_kernel(
                nvfp4_gemm.nvfp4_gemm_reduce_kernel,
                dict(parts="*fp32", bias="*bf16", out="*bf16", n="i32", count="i32"),
                dict(SPLIT=3, BLOCK=nvfp4_gemm.REDUCE_BLOCK),
                capability,
            ),
            compile_kernel(
                nvfp4_block_values.nvfp4_block_values_kernel,
                dict(packed="*u8", scale="*u8", out="*bf16", factor="fp32", **integers),
                dict(BLOCK_N=nvfp4_block_values.BLOCK_N, BLOCK_GROUPS=nvfp4_block_values.BLOCK_GROUPS),
                capability,
            ),
        ]
        assert all(".ftz" not in s.asm["ptx"] for s in sources)
