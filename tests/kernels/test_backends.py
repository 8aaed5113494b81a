"""Which backend is chosen, and the layouts that can be made on the CPU."""

import re

import pytest
import torch

from qerl_verl.config.settings import KERNELS
from qerl_verl.kernels import backends, hopper
from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.backends import (
    BACKENDS,
    Adapter,
    HopperBackend,
    KernelCount,
    TritonBackend,
    choose_backend,
    get_backend,
)
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight

CPU = torch.device("cpu")
N, K = 320, 192  # one whole group of the Hopper layout and a rest


@pytest.fixture
def weight():
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    return packed, torch.randint(1, 127, (N, K // 16), dtype=torch.uint8)


@pytest.fixture
def every_backend_runs(monkeypatch):
    for backend in BACKENDS:
        monkeypatch.setattr(type(backend), "unsupported_device", lambda self, device: None)


def test_the_setting_names_the_backends():
    assert KERNELS == ("auto", *(backend.name for backend in BACKENDS))


def test_auto_on_the_cpu_is_pytorch_and_says_why():
    choice = choose_backend(CPU)
    assert choice.backend is get_backend("pytorch")
    assert choice.sentence(CPU) == (
        "PyTorch (decode, GEMM) on cpu (not hopper: it runs on CUDA, not on cpu; "
        "not triton: it runs on CUDA, not on cpu)"
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("hopper", "qerl.kernel=hopper cannot run on cpu: it runs on CUDA.*use auto"),
        ("triton", "qerl.kernel=triton cannot run on cpu: it runs on CUDA.*use auto"),
        ("cutlass", "qerl.kernel=cutlass: choose one of auto, hopper, triton, pytorch"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_with_the_setting_and_the_fix(wanted, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(CPU, wanted=wanted)


def test_a_wanted_backend_is_taken_and_attributed_to_the_setting():
    choice = choose_backend(CPU, wanted="pytorch")
    assert choice.backend.name == "pytorch" and choice.sentence(CPU).endswith("on cpu (qerl.kernel)")


@pytest.mark.parametrize(
    ("hopper", "triton", "chosen"),
    [
        (None, None, ("hopper", "")),
        ("nvcc failed to compile them: x.cu(7): error: y", None, ("triton", "not hopper: nvcc failed to compile them: x.cu(7): error: y")),
        ("no g++", "no gcc", ("pytorch", "not hopper: no g++; not triton: no gcc")),
    ],
)  # fmt: skip
def test_auto_goes_on_to_the_next_backend_with_the_reason(monkeypatch, hopper, triton, chosen):
    """As where a compiler fails: found when the layer is built, and nothing is computed before."""
    monkeypatch.setattr(HopperBackend, "unsupported_device", lambda self, device: hopper)
    monkeypatch.setattr(TritonBackend, "unsupported_device", lambda self, device: triton)
    choice = choose_backend(CPU, (320, 192))
    assert (choice.backend.name, "; ".join(choice.passed_over)) == chosen
    for name, reason in (("hopper", hopper), ("triton", triton)):
        if reason:
            with pytest.raises(
                ValueError, match=re.escape(f"qerl.kernel={name} cannot run on cpu: {reason}; use auto")
            ):
                choose_backend(CPU, (320, 192), wanted=name)


def test_what_another_rank_cannot_run_is_passed_over_here_too(every_backend_runs):
    """The ranks share the bytes of a weight, and with them its layout."""
    elsewhere = {"hopper": "no nvcc (rank 3 on node2)"}
    choice = choose_backend(CPU, (320, 192), elsewhere=elsewhere)
    assert choice.backend.name == "triton" and choice.passed_over == ("not hopper: no nvcc (rank 3 on node2)",)
    with pytest.raises(ValueError, match=r"qerl.kernel=hopper cannot run on cpu: no nvcc \(rank 3 on node2\)"):
        choose_backend(CPU, (320, 192), wanted="hopper", elsewhere=elsewhere)


SERVED = [
    # wanted of which backend, rows, columns, dtype: who serves it under auto, and what the wanted
    # one says
    ("hopper", 320, 192, torch.bfloat16, "hopper", None),
    ("hopper", 320, 80, torch.bfloat16, "pytorch", "N and K have to be multiples of 64, got 320 x 80"),
    ("hopper", 100, 192, torch.bfloat16, "triton", "N and K have to be multiples of 64, got 100 x 192"),
    ("hopper", 320, 192, torch.float16, "triton", "activations have to be bfloat16, got torch.float16"),
    ("hopper", 320, 192, torch.float32, "pytorch", "activations have to be bfloat16, got torch.float32"),
    ("triton", 100, 80, torch.float16, "pytorch", "K has to be a multiple of 64, got 80"),
    ("triton", 320, 192, torch.float32, "pytorch", "activations have to be bfloat16 or float16, got torch.float32"),
    ("pytorch", 7, 16, torch.float64, "pytorch", None),
]


@pytest.mark.parametrize(("wanted", "n", "k", "dtype", "served", "reason"), SERVED)
def test_a_layer_goes_to_the_first_backend_that_serves_it(every_backend_runs, wanted, n, k, dtype, served, reason):
    choice = choose_backend(CPU, (n, k), dtype)
    assert choice.backend.name == served
    assert reason is None or f"not {wanted}: {reason}" in choice.passed_over
    assert get_backend(wanted).unsupported_weight(n, k, dtype) == reason
    if reason is None:
        assert choose_backend(CPU, (n, k), dtype, wanted).backend.name == wanted
        return
    message = f"qerl.rollout.kernel={wanted} does not serve mlp.down_proj of {n} x {k}: {reason}; use auto"
    with pytest.raises(ValueError, match=re.escape(message)):
        choose_backend(CPU, (n, k), dtype, wanted, setting="qerl.rollout.kernel", layer="mlp.down_proj")


ADAPTERS = [
    # rank and ends of an adapter on 1152 x 896: why PyTorch computes it
    ("hopper", Adapter(32, (896, 1024, 1152)), None),
    ("hopper", Adapter(8, (1152,)), None),  # padded to 16
    ("hopper", Adapter(32, (832, 1152)), "projections have to end at multiples of 128 rows, got [832, 1152]"),
    ("hopper", Adapter(32, (128, 256, 512, 1152)), "one to three projections that end at row 1152 are possible, got [128, 256, 512, 1152]"),
    ("triton", Adapter(32, (1152,)), None),
    ("triton", Adapter(32, (896, 1152)), "the kernel computes the adapter of one projection, got 2"),
    ("triton", Adapter(8, (1152,)), "the rank has to be a multiple of 16, got 8"),
    ("pytorch", Adapter(7, (100, 1152)), None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "adapter", "reason"), ADAPTERS)
def test_an_adapter_that_the_kernel_does_not_compute_is_told_and_refused_where_hopper_is_insisted_on(
    every_backend_runs, name, adapter, reason
):
    candidates = [get_backend(name)]
    assert choose_backend(CPU, (1152, 896), adapter=adapter, candidates=candidates).adapter == reason
    if name == "hopper" and reason:
        message = f"qerl.kernel=hopper does not take the adapter of qkv_proj of 1152 x 896: {reason}; use auto"
        with pytest.raises(ValueError, match=re.escape(message)):
            choose_backend(CPU, (1152, 896), wanted=name, layer="qkv_proj", adapter=adapter)
    else:
        assert choose_backend(CPU, (1152, 896), wanted=name, adapter=adapter).adapter == reason


def test_the_count_names_what_runs_where_by_kind_of_layer(every_backend_runs):
    count = KernelCount()
    for i in range(3):
        for kind, shape, ends in (
            ("qkv_proj", (1152, 896), (832, 1152)),
            ("o_proj", (896, 896), (896,)),
            ("down_proj", (896, 80), (896,)),
        ):
            adapter = Adapter(32, ends)
            count.add(f"model.layers.{i}.mlp.{kind}", choose_backend(CPU, shape, adapter=adapter), CPU)
    count.add("head", choose_backend(CPU, (64, 64), adapter=Adapter(32, (64,))), CPU)
    assert count.total == 10
    assert str(count) == (
        "Hopper W4A16 (WGMMA, CUDA C++) on cpu: 4 layers (o_proj 3, head 1); "
        "Hopper W4A16 (WGMMA, CUDA C++) on cpu: 3 layers (qkv_proj 3), their adapter in PyTorch "
        "(projections have to end at multiples of 128 rows, got [832, 1152]); "
        "PyTorch (decode, GEMM) on cpu (not hopper: N and K have to be multiples of 64, got 896 x 80; "
        "not triton: K has to be a multiple of 64, got 80): 3 layers (down_proj 3)"
    )


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_prepack_keeps_the_size_and_unpack_brings_the_bytes_back(name, weight):
    backend = get_backend(name)
    packed, scale = backend.prepack(*weight)
    assert [(t.shape, t.dtype) for t in (packed, scale)] == [(t.shape, t.dtype) for t in weight]
    assert torch.equal(packed, weight[0]) is (name != "hopper")
    assert all(torch.equal(t, w) for t, w in zip(backend.unpack(packed, scale), weight, strict=True))


@pytest.mark.parametrize("name", [backend.name for backend in BACKENDS])
def test_prepack_lora_b_and_back(name):
    backend = get_backend(name)
    b = torch.randn(N, 2 * backend.lora_rank_multiple)
    packed = backend.prepack_lora_b(b)
    assert packed.shape == b.shape and torch.equal(backend.unpack_lora_b(packed), b)


def test_an_adapter_that_the_hopper_kernel_does_not_serve_is_added_beside_it(monkeypatch, weight):
    """Projections that end off its tiles; the CPU computes the GEMM itself."""
    torch.manual_seed(1)
    hopper, reference = HopperBackend(), get_backend("pytorch")
    monkeypatch.setattr(
        backends.hopper,
        "gemm",
        lambda x, weight, bias: reference.linear(
            x, PackedWeight(*hopper.unpack(*weight[:2]), weight.global_scale), bias
        ),
    )
    x, bias = torch.randn(5, K), torch.randn(N)
    a, b, ends = torch.randn(2 * 16, K), torch.randn(N, 16), (192, N)
    prepacked = PackedWeight(*hopper.prepack(*weight), 1e3)
    got = hopper.lora_linear(x, prepacked, bias, a, hopper.prepack_lora_b(b), ends, 0.5)
    assert torch.equal(got, reference.lora_linear(x, PackedWeight(*weight, 1e3), bias, a, b, ends, 0.5))


def test_the_reference_multiplies_by_the_block_values(weight):
    torch.manual_seed(1)
    backend, x, bias = get_backend("pytorch"), torch.randn(2, 3, K), torch.randn(N)
    values = backend.block_values(*weight, torch.float32)
    assert torch.equal(values, block_values_nvfp4(*weight, torch.float32))
    torch.testing.assert_close(backend.linear(x, PackedWeight(*weight, 1e3), bias), x @ values.t() * 1e-3 + bias)


@pytest.mark.parametrize("tokens", [1, 512, 513, 6144, 6145, 12288])
def test_what_decodes_first_is_what_the_kernels_plans_say(tokens):
    n, k = 3584, 18944
    hopper_plan, triton_plan = hopper.tuning.choose(tokens, n, k, 132), triton_kernels.tuning.choose(tokens, n, k)
    assert get_backend("hopper").decodes_first(tokens, n, k) is (hopper_plan == hopper.tuning.DECODE_FIRST)
    assert get_backend("triton").decodes_first(tokens, n, k) is (triton_plan == triton_kernels.tuning.DECODE_FIRST)
    assert get_backend("pytorch").decodes_first(tokens, n, k)
