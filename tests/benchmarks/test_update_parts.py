"""Tests that the GPU time of a training step is divided by what its kernels compute."""

from types import SimpleNamespace

import pytest
import torch
from update_parts import (
    ATTENTION,
    BASE,
    DECODE,
    IDLE,
    LORA,
    LOSS,
    OPTIMIZER,
    OPTIMIZER_RANGE,
    OTHER,
    UNKNOWN,
    divide,
    part_of,
)

VOCABULARY, RANK = 152064, 32
KERNELS = {
    "cuBLAS on a decoded weight": (("aten::mm", "nvjet_tst", [[768, 3584], [3584, 4608]]), BASE),
    "gradient of the input": (("aten::addmm_", "nvjet_tst", [[768, 3584], [768, 4608], [4608, 3584], [], []]), BASE),
    "our GEMM": (
        ("qerl_hopper::nvfp4_gemm", "nvfp4_gemm<...>", [[768, 3584], [4608, 1792], [4608, 224], [], []]),
        BASE,
    ),
    "x A^T": (("aten::mm", "gemm", [[768, 3584], [3584, 32]]), LORA),
    "gradient of B": (("aten::mm", "gemm", [[4608, 768], [768, 32]]), LORA),
    "logits": (("aten::mm", "nvjet_tst", [[1024, 3584], [3584, 152064]]), LOSS),
    "softmax": (("aten::_log_softmax", "cunn_SoftMaxForward", [[1024, 152064], [], []]), LOSS),
    "loss": (("aten::nll_loss_forward", "nll_loss_forward_reduce", [[1024], [1024]]), LOSS),
    "decoding": (("qerl_hopper::nvfp4_block_values", "dequantize_kernel", [[4608, 1792], [4608, 224]]), DECODE),
    "SDPA": (("aten::_flash_attention_forward", "pytorch_flash::flash_fwd_kernel", [[16, 768, 28, 128]]), ATTENTION),
    "compiled": (("Torch-Compiled Region: 0/0", "triton_poi_fused_silu_mul_0", [[768, 18944]]), OTHER),
    "rotary embedding": (("aten::mul", "elementwise_kernel", [[16, 28, 768, 128], [16, 1, 768, 128]]), OTHER),
    "tensor lists": (("aten::_foreach_norm", "multi_tensor_apply_kernel", [[[32, 3584], [4608, 32]], []]), OTHER),
}


@pytest.mark.parametrize(("kernel", "part"), KERNELS.values(), ids=KERNELS.keys())
def test_a_kernel_belongs_to_the_part_of_its_operator(kernel, part):
    assert part_of(*kernel, VOCABULARY, RANK, []) == part
    assert part_of(*kernel, VOCABULARY, RANK, ["aten::x", OPTIMIZER_RANGE]) == OPTIMIZER


def event(name, kernels=(), shapes=None, parent=None, device="CPU", us=0.0, annotation=False):
    return SimpleNamespace(
        name=name,
        kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels],
        input_shapes=shapes,
        cpu_parent=parent,
        device_type=SimpleNamespace(name=device),
        is_user_annotation=annotation,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
    )


def test_the_parts_add_up_to_the_time_of_the_step():
    optimizer = event(OPTIMIZER_RANGE)
    events = [
        event("aten::linear"),
        event("aten::mm", [("nvjet", 4000.0)], [[768, 3584], [3584, 4608]]),
        optimizer,
        event("aten::_fused_adamw_", [("multi_tensor", 500.0)], [[]], parent=optimizer),
        event("nvjet", device="CUDA", us=4000.0),
        event("multi_tensor", device="CUDA", us=500.0),
        event("copy of nobody", device="CUDA", us=1500.0),
        event(OPTIMIZER_RANGE, device="CUDA", us=900.0, annotation=True),
    ]
    parts = divide(events, 10.0, VOCABULARY, RANK)
    assert {part: ms for part, ms in parts.items() if ms} == {BASE: 4.0, OPTIMIZER: 0.5, UNKNOWN: 1.5, IDLE: 4.0}
    assert sum(parts.values()) == 10.0


def test_pytorchs_events_have_what_is_read():
    """On a CPU no kernels, but the fields and the ranges around an operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as found:
        with torch.profiler.record_function(OPTIMIZER_RANGE):
            torch.mm(torch.ones(2, 3), torch.ones(3, 4))
    events = found.events()
    (mm,) = [e for e in events if e.name == "aten::mm"]
    assert mm.input_shapes[:2] == [[2, 3], [3, 4]] and mm.kernels == [] and mm.cpu_parent.name == OPTIMIZER_RANGE
    assert divide(events, 1.0, 5, 2) == dict.fromkeys(
        (BASE, DECODE, LORA, ATTENTION, LOSS, OPTIMIZER, OTHER, UNKNOWN), 0.0
    ) | {IDLE: 1.0}
