"""Tests which layers keep their outputs, on a device whose memory the test simulates."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qerl_verl.engine import recompute
from qerl_verl.engine.recompute import Recompute
from qerl_verl.kernels.backends import Backend
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear
from qerl_verl.kernels.nvfp4_quantize import quantize_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROWS, WIDTH, LAYERS = 8, 16, 6
OUTPUT = ROWS * WIDTH * 4


@pytest.fixture
def device(monkeypatch):
    """Provides figures of a GPU's memory, in bytes."""
    memory = {"free": 0, "reserved": 0, "allocated": 0, "peak": 0}
    monkeypatch.setattr(recompute.torch.cuda, "mem_get_info", lambda device: (memory["free"], 1 << 40))
    monkeypatch.setattr(recompute.torch.cuda, "memory_reserved", lambda device: memory["reserved"])
    monkeypatch.setattr(recompute.torch.cuda, "memory_allocated", lambda device: memory["allocated"])
    monkeypatch.setattr(recompute.torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    return memory


class Counting(Backend):
    def __init__(self):
        self.outputs = 0

    def linear(self, *args):
        self.outputs += 1
        return super().linear(*args)

    def add_linear(self, *args):
        self.outputs += 1
        return super().add_linear(*args)


def micro_batch(policy, rows=ROWS):
    """Runs forward and backward of six checkpointed layers with two GEMMs each.

    Returns the number of GEMMs that the backward pass computed again.
    """
    backend = Counting()
    torch.manual_seed(0)
    weight = PackedWeight(*quantize_nvfp4(torch.randn(WIDTH, WIDTH), torch.tensor([300.0])), 300.0)
    x = torch.randn(rows, WIDTH).requires_grad_()

    def layer(x):
        h = nn.functional.silu(nvfp4_linear(x, weight, None, backend))
        return x + nvfp4_linear(h, weight, None, backend)

    policy.begin()
    y = x
    for _ in range(LAYERS):
        y = checkpoint(layer, y, use_reentrant=False, context_fn=policy.context_fn)
    forward = backend.outputs
    assert forward == 2 * LAYERS
    y.sum().backward()
    policy.observe()
    return backend.outputs - forward


def test_full_and_selective_need_no_measurement():
    said = []
    full, selective = (Recompute(how, CPU, said.append) for how in ("full", "selective"))
    assert micro_batch(full) == LAYERS and not full.keeps
    assert micro_batch(selective) == 0 and selective.keeps
    assert said == ["every layer recomputes everything", "every layer keeps the outputs of its linears"]


def test_on_a_cpu_auto_is_full():
    assert Recompute("auto", CPU).how == "full"


def test_the_first_micro_batch_measures_and_the_next_fill_what_is_free(device):
    said = []
    policy = Recompute("auto", CUDA, said.append)
    device |= {"free": 10**6, "allocated": 1000, "reserved": 1000, "peak": 1000 + 100 * ROWS}
    assert micro_batch(policy) == LAYERS and not policy.keeps and said == []
    # 100 bytes a token are needed; room for three and a half layers beside them, after both margins
    device |= {"free": int(1.1 * 100 * ROWS + 3.5 * OUTPUT / 0.9) - OUTPUT}
    assert micro_batch(policy) == LAYERS - 3 and policy.keeps
    assert (
        len(said) == 1
        and said[0].startswith(f"3 of {LAYERS} layers keep the outputs of their linears")
        and f"{ROWS} tokens" in said[0]
    )
    device["free"] = 10**6
    assert micro_batch(policy) == 0
    assert len(said) == 1  # once


def test_memory_that_the_allocator_holds_but_does_not_use_is_free(device):
    policy = Recompute("auto", CUDA)
    micro_batch(policy)
    device |= {"reserved": 10**6}
    assert micro_batch(policy) == 0


def test_a_full_device_keeps_nothing(device):
    policy = Recompute("auto", CUDA)
    device |= {"free": 10**6, "peak": 10**6}
    for _ in range(3):
        assert micro_batch(policy) == LAYERS and not policy.keeps


def test_twice_the_tokens_need_twice_the_room(device):
    policy = Recompute("auto", CUDA)
    device |= {"free": 10**6, "peak": 10**4}
    micro_batch(policy)
    need = 10**4
    device["free"] = int(1.1 * need + (LAYERS + 1) * OUTPUT / 0.9)
    assert micro_batch(policy) == 0
    assert micro_batch(policy, 2 * ROWS) == LAYERS


def test_a_peak_that_is_not_the_steps_own_is_corrected_later(device):
    """The process may have needed more before. A later micro-batch below that peak shows that it
    needs less.
    """
    policy = Recompute("auto", CUDA)
    device |= {"free": 3 * 10**4, "peak": 8 * 10**4}
    micro_batch(policy)
    device |= {"allocated": 7 * 10**4, "reserved": 7 * 10**4}
    assert micro_batch(policy) == LAYERS  # 30000 bytes are free and 80000 would be needed
    assert micro_batch(policy) == 0  # it was 10000


@pytest.mark.gpu
def test_on_a_gpu_the_peak_stays_below_what_was_free():
    """Not all outputs fit: some layers keep theirs, and the memory suffices."""
    device, rows, width = torch.device("cuda", 0), 1 << 14, 4096
    packed, scale = (t.to(device) for t in quantize_nvfp4(torch.randn(width, width), torch.tensor([300.0])))
    weight = PackedWeight(packed, scale, 1e4)
    output = rows * width * 2
    free, _ = torch.cuda.mem_get_info(device)
    ballast = torch.empty(free - 30 * output, dtype=torch.uint8, device=device)
    said = []
    policy = Recompute("auto", device, said.append)

    def layer(x):
        h = nn.functional.silu(nvfp4_linear(x, weight))
        return x + nvfp4_linear(h, weight)

    gradients = []
    for _ in range(3):
        policy.begin()
        x = torch.ones(rows, width, dtype=torch.bfloat16, device=device).mul_(0.01).requires_grad_()
        y = x
        for _ in range(12):
            y = checkpoint(layer, y, use_reentrant=False, context_fn=policy.context_fn)
        y.sum().backward()
        policy.observe()
        gradients.append(x.grad)
        del x, y
    kept = int(said[0].split(" of ")[0])
    assert 0 < kept < 12, said
    assert all(torch.equal(g, gradients[0]) for g in gradients)
    del ballast
