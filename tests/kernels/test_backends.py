"""Which backend is chosen, and the layouts that can be made on the CPU."""

import pytest
import torch

from qerl_verl.kernels import backends, hopper, portable
from qerl_verl.kernels.backends import NAMES, HopperBackend, backend_for, choose_backend, get_backend
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4

CPU = torch.device("cpu")
N, K = 320, 192  # one whole group of the Hopper layout and a rest


@pytest.fixture
def weight():
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    return packed, torch.randint(1, 127, (N, K // 16), dtype=torch.uint8)


def test_auto_on_the_cpu_is_pytorch_and_says_why():
    backend, text = choose_backend(CPU)
    assert backend is get_backend("pytorch")
    assert text == (
        "PyTorch (dequantize, matrix product) on cpu (not hopper: it runs on CUDA, not on cpu; "
        "not triton: it runs on CUDA, not on cpu)"
    )


@pytest.mark.parametrize("name", ["hopper", "triton"])
def test_a_wanted_backend_that_cannot_run_is_refused_with_the_key_and_the_cure(name):
    with pytest.raises(ValueError, match=f"qerl.kernel={name} cannot run on cpu: it runs on CUDA.*use auto"):
        choose_backend(CPU, name)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="qerl.kernel=cutlass: choose one of auto, hopper, triton, pytorch"):
        choose_backend(CPU, "cutlass")


def test_a_wanted_backend_is_taken_and_attributed_to_the_setting():
    backend, text = choose_backend(CPU, "pytorch")
    assert backend.name == "pytorch" and text.endswith("on cpu (qerl.kernel)")


def test_auto_takes_the_first_that_the_device_has(monkeypatch):
    reasons = {"hopper": "another GPU", "triton": None}
    monkeypatch.setattr(backends, "unavailable", lambda name, device: reasons[name])
    backend, text = choose_backend(CPU)
    assert backend.name == "triton" and text == "Triton W4A16 on cpu (not hopper: another GPU)"


@pytest.mark.parametrize(
    ("name", "n", "k", "dtype", "served"),
    [
        ("hopper", 320, 192, torch.bfloat16, "hopper"),
        ("hopper", 320, 80, torch.bfloat16, "pytorch"),
        ("hopper", 100, 192, torch.bfloat16, "pytorch"),
        ("hopper", 320, 192, torch.float32, "pytorch"),
        ("triton", 100, 192, torch.float16, "triton"),
        ("triton", 100, 80, torch.bfloat16, "pytorch"),
        ("triton", 320, 192, torch.float32, "pytorch"),
        ("pytorch", 7, 16, torch.float64, "pytorch"),
    ],
)
def test_a_shape_or_dtype_that_the_backend_refuses_goes_to_pytorch(monkeypatch, name, n, k, dtype, served):
    monkeypatch.setattr(backends, "unavailable", lambda name, device: None)
    assert backend_for(CPU, n, k, dtype, name).name == served
    reason = get_backend(name).refuses(n, k, dtype)
    assert (reason is None) is (served == name)


@pytest.mark.parametrize("name", NAMES)
def test_prepack_keeps_the_size_and_unpack_brings_the_bytes_back(name, weight):
    backend = get_backend(name)
    packed, scale = backend.prepack(*weight)
    assert [(t.shape, t.dtype) for t in (packed, scale)] == [(t.shape, t.dtype) for t in weight]
    assert torch.equal(packed, weight[0]) is (name != "hopper")
    assert all(torch.equal(t, w) for t, w in zip(backend.unpack(packed, scale), weight, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_prepack_lora_b_and_back(name):
    backend = get_backend(name)
    b = torch.randn(N, 2 * backend.lora_rank_multiple)
    packed = backend.prepack_lora_b(b)
    assert packed.shape == b.shape and torch.equal(backend.unpack_lora_b(packed), b)


def test_an_adapter_that_the_hopper_kernel_does_not_serve_is_added_beside_it(monkeypatch, weight):
    """Projections that end off its tiles; the matrix product itself is stood in for on the CPU."""
    torch.manual_seed(1)
    hopper, reference = HopperBackend(), get_backend("pytorch")
    monkeypatch.setattr(
        backends.hopper,
        "gemm",
        lambda x, packed, scale, alpha, bias: reference.linear(x, *hopper.unpack(packed, scale), alpha, bias),
    )
    x, bias = torch.randn(5, K), torch.randn(N)
    a, b, ends = torch.randn(2 * 16, K), torch.randn(N, 16), (192, N)
    got = hopper.lora_linear(x, *hopper.prepack(*weight), 1e-3, bias, a, hopper.prepack_lora_b(b), ends, 0.5)
    assert torch.equal(got, reference.lora_linear(x, *weight, 1e-3, bias, a, b, ends, 0.5))


def test_the_reference_multiplies_by_the_block_values(weight):
    torch.manual_seed(1)
    backend, x, bias = get_backend("pytorch"), torch.randn(2, 3, K), torch.randn(N)
    values = backend.block_values(*weight, torch.float32)
    assert torch.equal(values, block_values_nvfp4(*weight, torch.float32))
    torch.testing.assert_close(backend.linear(x, *weight, 1e-3, bias), x @ values.t() * 1e-3 + bias)


@pytest.mark.parametrize("tokens", [1, 512, 513, 6144, 6145, 12288])
def test_what_dequantizes_is_what_the_kernels_plans_say(tokens):
    n, k = 3584, 18944
    hopper_plan, portable_plan = hopper.tuning.choose(tokens, n, k, 132), portable.tuning.choose(tokens, n, k)
    assert get_backend("hopper").dequantizes(tokens, n, k) is (hopper_plan == hopper.tuning.DEQUANTIZE)
    assert get_backend("triton").dequantizes(tokens, n, k) is (portable_plan == portable.tuning.DEQUANTIZE)
    assert get_backend("pytorch").dequantizes(tokens, n, k)
