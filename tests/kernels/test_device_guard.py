"""Operators with tensors on a device that is not the current one."""

import contextlib

import pytest
import torch

from qerl_verl.kernels import hopper, portable
from qerl_verl.kernels.device_guard import on_tensors_device
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4

NAMESPACES = {"qerl_hopper": hopper.OPERATORS, "qerl_portable": portable.OPERATORS}


def tensor_on(device: str) -> torch.Tensor:
    """A tensor that says it is there; no GPU is needed."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device(device)

    return torch.zeros(1).as_subclass(Elsewhere)


@pytest.fixture
def current(monkeypatch):
    """The devices that were made current, the innermost last."""
    stack = []

    @contextlib.contextmanager
    def device(index):
        stack.append(str(index))
        yield
        stack.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return stack


@pytest.mark.parametrize(
    ("devices", "expected"), [(["cuda:1", "cuda:1"], ["cuda:1"]), (["cuda:0"], ["cuda:0"]), (["cpu"], [])]
)
def test_the_device_of_the_tensors_is_current(current, devices, expected):
    guarded = on_tensors_device(lambda *args, **kwargs: list(current))
    tensors = [tensor_on(device) for device in devices]
    assert guarded(0.5, *tensors, None) == expected
    assert guarded(weight=tensors) == expected and current == []


def test_tensors_on_several_devices_are_refused(current):
    guarded = on_tensors_device(lambda *args: pytest.fail("it ran"))
    with pytest.raises(ValueError, match="one device, got cuda:0, cuda:1"):
        guarded(tensor_on("cuda:1"), None, tensor_on("cuda:0"))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_operator_is_guarded(namespace):
    """Each that is defined, and what the guard surrounds is the implementation."""
    schemas = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    defined = {name.partition("::")[2] for name in schemas if name.startswith(f"{namespace}::")}
    assert defined == set(NAMESPACES[namespace]) and len(defined) >= 3
    guard = on_tensors_device(len).__code__
    assert all(f.__code__ is guard and f.__wrapped__.__code__ is not guard for f in NAMESPACES[namespace].values())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu_while_the_first_is_current():
    torch.manual_seed(0)
    weight = torch.randn(128, 128)
    global_scale = nvfp4_global_scale(weight.abs().max())
    packed, scale = (t.cuda(1) for t in quantize_nvfp4(weight, global_scale))
    x = torch.randn(5, 128, dtype=torch.bfloat16, device="cuda:1")
    expected = block_values_nvfp4(packed, scale, torch.bfloat16)
    y = x.double() @ expected.double().t()
    torch.cuda.set_device(0)
    assert torch.equal(portable.dequantize(packed, scale), expected)
    assert torch.equal(portable.quantize(weight.cuda(1), global_scale.cuda(1))[0], packed)
    torch.testing.assert_close(portable.gemm(x, packed, scale, 1.0).double(), y, rtol=1e-2, atol=1e-1)
    if hopper.availability(1) is None:
        packed_p, scale_p = hopper.prepack(packed, scale.view(torch.uint8))
        a, b = torch.randn(16, 128, device="cuda:1").bfloat16(), torch.zeros(128, 16, device="cuda:1").bfloat16()
        assert torch.equal(hopper.dequantize(packed_p, scale_p), expected)
        got = hopper.gemm(x, packed_p, scale_p, 1.0)
        torch.testing.assert_close(got.double(), y, rtol=1e-2, atol=1e-1)
        with_zeros = hopper.lora_gemm(x, packed_p, scale_p, 1.0, None, a, hopper.prepack_lora_b(b), [128], 1.0)
        assert torch.equal(with_zeros, got)
    assert torch.cuda.current_device() == 0
