"""Tests a layer's weight in the layout of a backend, for every storage dtype and on the meta
device."""

import pytest
import torch
from torch import nn

from qerl_verl.kernels import backends
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.loading import prepack_linears

CPU = torch.device("cpu")


@pytest.fixture
def hopper_is_there(monkeypatch):
    """Claims a Hopper GPU. Its layout is made in plain PyTorch, so everything but the GEMM works on
    the CPU."""
    monkeypatch.setattr(backends.HopperBackend, "unsupported_device", lambda self, device: None)


def layer(n=128, k=192, storage_dtype=torch.uint8, device=None):
    torch.manual_seed(0)
    weight = torch.randn(n, k)
    scale = nvfp4_global_scale(weight.abs().max())
    packed, block = quantize_nvfp4(weight, scale)
    made = NVFP4Linear(k, n, True, torch.bfloat16, device=device, storage_dtype=storage_dtype)
    if device != "meta":
        for place, new in zip(made.weight_bytes(), (packed, block), strict=True):
            place.copy_(new.view(torch.uint8))
        made.weight_global_scale.copy_(scale)
        nn.init.normal_(made.bias)
    return made


@pytest.mark.parametrize("storage_dtype", [torch.uint8, torch.float32])
def test_another_layout_is_the_same_weight(hopper_is_there, storage_dtype):
    made = layer(storage_dtype=storage_dtype)
    before, weight = [t.clone() for t in made.weight_bytes()], made.dequantize()
    place = made.weight_joined.data_ptr()
    made.use_backend(CPU, "hopper")
    assert made.backend.name == "hopper" and not torch.equal(made.weight_bytes()[0], before[0])
    assert torch.equal(made.dequantize(), weight)
    assert made.weight_joined.dtype == storage_dtype and made.weight_joined.nbytes == 128 * 192 * 9 // 16
    assert made.weight_joined.data_ptr() == place and all(t.is_contiguous() for t in made.weight_bytes())
    made.use_backend(CPU, "pytorch")
    assert all(torch.equal(t, b) for t, b in zip(made.weight_bytes(), before, strict=True))


def test_choosing_the_same_backend_again_changes_nothing(hopper_is_there):
    made = layer()
    made.use_backend(CPU, "hopper")
    before = made.weight_joined.clone()
    made.use_backend(CPU, "hopper")
    assert torch.equal(made.weight_joined, before)


def test_a_layer_without_data_gets_the_kernels_and_receives_prepacked_bytes(hopper_is_there):
    """On all ranks but the first the bytes come from rank 0, which has prepacked them."""
    source, empty = layer(), layer(device="meta")
    weight = source.dequantize()
    for made in (source, empty):
        made.use_backend(CPU, "hopper")
    assert empty.backend is source.backend and empty.weight_joined.is_meta
    empty.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(empty.dequantize(), weight)


def test_the_forward_pass_calls_the_backend_with_its_own_layout(hopper_is_there, monkeypatch):
    made, x = layer(), torch.randn(3, 192, dtype=torch.bfloat16)
    expected = made(x)
    made.use_backend(CPU, "hopper")
    reference, seen = backends.get_backend("pytorch"), []

    def gemm(x, weight, bias):
        seen.append(weight.packed)
        unpacked = made.backend.unpack(weight.packed, weight.scale)
        return reference.linear(x, PackedWeight(*unpacked, weight.global_scale), bias)

    monkeypatch.setattr(backends.hopper, "gemm", gemm)
    assert torch.equal(made(x), expected)
    assert seen[0].data_ptr() == made.weight_joined.data_ptr()


def test_the_text_counts_what_runs_where_and_why(hopper_is_there):
    parts = {"a": layer(), "b": layer(k=80), "c": nn.Linear(4, 4), "d": layer(n=100)}
    model = nn.ModuleDict(parts)
    layers = [m for m in model.values() if isinstance(m, NVFP4Linear)]
    weights = [m.dequantize() for m in layers]
    assert prepack_linears(model, CPU) == (
        "Hopper W4A16 (WGMMA, CUDA C++) on cpu: 1 layer (a 1); "
        "PyTorch (decode, GEMM) on cpu (not hopper: N and K have to be multiples of 64, got 128 x 80; "
        "not triton: it runs on CUDA, not on cpu): 1 layer (b 1); "
        "PyTorch (decode, GEMM) on cpu (not hopper: N and K have to be multiples of 64, got 100 x 192; "
        "not triton: it runs on CUDA, not on cpu): 1 layer (d 1)"
    )
    assert [m.backend.name for m in layers] == ["hopper", "pytorch", "pytorch"]
    assert all(torch.equal(m.dequantize(), w) for m, w in zip(layers, weights, strict=True))
    text = prepack_linears(nn.Sequential(layer()), CPU, "hopper")
    assert text == "Hopper W4A16 (WGMMA, CUDA C++) on cpu (qerl.kernel): 1 layer (0 1)"


@pytest.mark.parametrize(
    ("overrides", "dtype", "reason"),
    [
        ({"k": 80}, torch.bfloat16, "N and K have to be multiples of 64, got 128 x 80"),
        ({"n": 100}, torch.bfloat16, "N and K have to be multiples of 64, got 100 x 192"),
        ({}, torch.float16, "activations have to be bfloat16, got torch.float16"),
    ],
)
def test_a_kernel_that_is_insisted_on_and_does_not_serve_a_layer_is_refused_by_its_name(
    hopper_is_there, overrides, dtype, reason
):
    model = nn.ModuleDict({"fits": layer(), "mlp": nn.ModuleDict({"down_proj": layer(**overrides)})})
    named = "mlp.down_proj" if overrides else "fits"
    with pytest.raises(ValueError, match=f"qerl.kernel=hopper does not serve {named} of .*: {reason}; use auto"):
        prepack_linears(model, CPU, "hopper", dtype)


def test_on_the_cpu_the_text_says_why_pytorch():
    text = prepack_linears(nn.Sequential(layer()), CPU)
    assert text.startswith("PyTorch (decode, GEMM) on cpu (not hopper: ") and "; not triton: " in text
    with pytest.raises(ValueError, match="qerl.kernel=hopper cannot run on cpu"):
        prepack_linears(nn.Sequential(layer()), CPU, "hopper")
