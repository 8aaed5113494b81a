"""Operators with tensors on a device that is not the current one."""

import contextlib
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

from qerl_verl.kernels import hopper
from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.device_guard import on_tensors_device
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_experts import ExpertStack, nvfp4_experts_reference, route_softmax
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight
from tests.helpers.tiny_experts import TinyExperts, make_tokens

NAMESPACES = {"qerl_hopper": hopper.OPERATORS, "qerl_triton": triton_kernels.OPERATORS}


def tensor_on(device: str) -> torch.Tensor:
    """Returns a tensor that says it is there; no GPU is needed."""

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device(device)

    return torch.zeros(1).as_subclass(Elsewhere)


@pytest.fixture
def current(monkeypatch):
    """Returns the devices that were made current, the innermost last."""
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
    assert defined == set(NAMESPACES[namespace]) and len(defined) >= 2
    guard = on_tensors_device(len).__code__
    assert all(f.__code__ is guard and f.__wrapped__.__code__ is not guard for f in NAMESPACES[namespace].values())


N, K, RANK, TOKENS, GLOBAL_SCALE = 128, 128, 16, 5, 640.0
ROUNDING = 2**-7
"""Relative to the largest output: sums in float32, rounded to bfloat16."""


def problem() -> SimpleNamespace:
    """Inputs of all operators, on the host."""
    torch.manual_seed(0)
    t = SimpleNamespace(weight=torch.randn(N, K), x=torch.randn(TOKENS, K).bfloat16(), bias=torch.randn(N).bfloat16())
    t.global_scale = nvfp4_global_scale(t.weight.abs().max())
    t.packed, t.scale = quantize_nvfp4(t.weight, t.global_scale)
    t.a, t.b = torch.randn(RANK, K).bfloat16(), torch.randn(N, RANK).bfloat16()
    tokens, logits = make_tokens(torch.bfloat16, TOKENS, 64, 4)
    t.routed = (tokens, *route_softmax(logits, 2, True))
    t.experts = tuple(ExpertStack(s.packed, s.scale, s.factors.float()) for s in TinyExperts(4, 64, 64).weights())
    return t


def on_device(value, device: str):
    """Returns a problem with all of its tensors there."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, SimpleNamespace):
        return SimpleNamespace(**{name: on_device(v, device) for name, v in vars(value).items()})
    if isinstance(value, ExpertStack):
        return ExpertStack(*(getattr(value, field.name).to(device) for field in fields(value)))
    return tuple(on_device(v, device) for v in value)


def linear(t) -> torch.Tensor:
    weight = block_values_nvfp4(t.packed, t.scale, torch.float32).double()
    return t.x.double() @ weight.t() / GLOBAL_SCALE + t.bias.double()


def prepacked(t) -> PackedWeight:
    return PackedWeight(*hopper.prepack(t.packed, t.scale.view(torch.uint8)), GLOBAL_SCALE)


VALUES = {
    "qerl_triton::nvfp4_block_values": (
        lambda t: triton_kernels.block_values(t.packed, t.scale),
        lambda t: block_values_nvfp4(t.packed, t.scale, torch.bfloat16),
        0,
    ),
    "qerl_triton::nvfp4_gemm": (
        lambda t: triton_kernels.gemm(t.x, PackedWeight(t.packed, t.scale, GLOBAL_SCALE), t.bias),
        linear,
        ROUNDING,
    ),
    "experts": (
        lambda t: triton_kernels.experts(*t.routed, *t.experts),
        lambda t: nvfp4_experts_reference(t.routed[0].double(), *t.routed[1:], *t.experts),
        4 * ROUNDING,  # rounded after each GEMM, after the activation and at the end
    ),
    "qerl_hopper::nvfp4_block_values": (
        lambda t: hopper.block_values(*prepacked(t)[:2]),
        lambda t: block_values_nvfp4(t.packed, t.scale, torch.bfloat16),
        0,
    ),
    "qerl_hopper::nvfp4_gemm": (
        lambda t: hopper.gemm(t.x, prepacked(t), t.bias),
        linear,
        ROUNDING,
    ),
    "qerl_hopper::nvfp4_lora_gemm": (
        lambda t: hopper.lora_gemm(t.x, prepacked(t), t.bias, t.a, hopper.prepack_lora_b(t.b), [N], 0.5),
        lambda t: add_lora_reference(linear(t), t.x.double(), t.a.double(), t.b.double(), [N], 0.5),
        2 * ROUNDING,  # x A^T is rounded as well
    ),
}
"""What each operator, and the one function of ours beside them that launches kernels, gives and has
to give, and how far apart the two may be."""


def test_every_operator_has_its_values():
    assert set(VALUES) - {"experts"} == {f"{space}::{name}" for space, names in NAMESPACES.items() for name in names}


def check_values(name: str, device: str) -> None:
    operator, reference, tolerance = VALUES[name]
    t = problem()
    got, want = operator(on_device(t, device)), reference(t)
    for a, b in zip((got,) if torch.is_tensor(got) else got, (want,) if torch.is_tensor(want) else want, strict=True):
        assert str(a.device) == device
        far = (a.cpu().double() - b.double()).abs().max()
        assert far <= tolerance * b.double().abs().max(), f"{name}: {far}"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("current, other", [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", VALUES)
def test_on_one_gpu_while_another_is_current(name, current, other):
    if "hopper" in name and (reason := hopper.unsupported_device(other)):
        pytest.skip(reason)
    with torch.cuda.device(current):
        check_values(name, f"cuda:{other}")
        torch.cuda.synchronize(other)
        assert torch.cuda.current_device() == current
