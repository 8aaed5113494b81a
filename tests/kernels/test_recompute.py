"""What a checkpointed layer computes again, counted, with gradients equal bit for bit to those
without checkpointing."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qerl_verl.kernels.backends import Backend
from qerl_verl.kernels.nvfp4_linear import nvfp4_linear
from qerl_verl.kernels.nvfp4_lora_linear import nvfp4_lora_linear
from qerl_verl.kernels.nvfp4_quantize import quantize_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.recompute import KeptOutputs

WIDTH, RANK = 32, 4


class CountingBackend(Backend):
    def __init__(self):
        self.gemms = 0

    def linear(self, *args):
        self.gemms += 1
        return super().linear(*args)

    def add_linear(self, *args):
        self.gemms += 1
        return super().add_linear(*args)


class Layer(nn.Module):
    """Runs two GEMMs with a nonlinearity between and a residual around them. ``changed`` writes
    into the output of the first."""

    def __init__(self, backend, lora: bool = True, changed: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.backend, self.changed = backend, changed
        made = [quantize_nvfp4(torch.randn(WIDTH, WIDTH), torch.tensor([300.0])) for _ in range(2)]
        self.weights = [PackedWeight(*pair, 300.0) for pair in made]
        self.adapters = nn.ParameterList(torch.randn(shape) * 0.2 for shape in 2 * [(RANK, WIDTH), (WIDTH, RANK)])
        self.bias = nn.Parameter(torch.randn(WIDTH), requires_grad=not lora)
        self.lora = lora

    def linear(self, x, i):
        if not self.lora:
            return nvfp4_linear(x, self.weights[i], self.bias, self.backend)
        a, b = self.adapters[2 * i : 2 * i + 2]
        return nvfp4_lora_linear(x, self.weights[i], self.bias, a, b, 2.0, self.backend)

    def forward(self, x):
        h = self.linear(x, 0)
        if self.changed:
            h = h.mul_(0.5)
        return x + self.linear(torch.nn.functional.silu(h), 1)


def gradients(lora=True, changed=False, contexts=None, checkpointed=True):
    """Returns gradients of two layers in a row, and how many GEMMs forward and backward took."""
    backend = CountingBackend()
    layers = [Layer(backend, lora, changed) for _ in range(2)]
    x = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = x
    for layer in layers:
        options = {} if contexts is None else {"context_fn": contexts}
        y = checkpoint(layer, y, use_reentrant=False, **options) if checkpointed else layer(y)
    forward = backend.gemms
    y.square().sum().backward()
    trained = [x] + [p for layer in layers for p in layer.parameters() if p.requires_grad and (lora or p is layer.bias)]
    return [p.grad for p in trained], forward, backend.gemms - forward


def keeping(made=None):
    def contexts():
        outputs = KeptOutputs()
        if made is not None:
            made.append(outputs)
        return outputs.recording(), outputs.replaying()

    return contexts


@pytest.mark.parametrize("lora", [True, False])
def test_the_layers_last_gemm_is_not_computed_again(lora):
    plain, forward, again = gradients(lora, checkpointed=False)
    assert (forward, again) == (4, 0)
    found, forward, again = gradients(lora)
    assert (forward, again) == (4, 2)
    assert all(torch.equal(f, p) for f, p in zip(found, plain, strict=True))


@pytest.mark.parametrize("lora", [True, False])
def test_kept_outputs_are_not_computed_again_and_nothing_is_held_in_the_end(lora):
    plain, _, _ = gradients(lora, checkpointed=False)
    made = []
    found, forward, again = gradients(lora, contexts=keeping(made))
    assert (forward, again) == (4, 0)
    assert all(torch.equal(f, p) for f, p in zip(found, plain, strict=True))
    assert [(p.bytes, p.rows) for p in made] == [(0, 15)] * 2


def test_a_recorded_run_holds_all_outputs_but_the_last():
    outputs, layer = KeptOutputs(), Layer(Backend())
    with outputs.recording():
        layer(torch.randn(7, WIDTH))
    assert (outputs.bytes, outputs.rows) == (7 * WIDTH * 4, 7)
    outputs.drop()
    assert outputs.bytes == 0


def test_an_output_that_the_layer_writes_into_is_computed_again():
    plain, _, _ = gradients(changed=True, checkpointed=False)
    found, _, again = gradients(changed=True, contexts=keeping())
    assert again == 2
    assert all(torch.equal(f, p) for f, p in zip(found, plain, strict=True))


def test_dropped_outputs_are_computed_again():
    def contexts():
        outputs = KeptOutputs()
        outputs.drop()
        return nullcontext(), outputs.replaying()

    plain, _, _ = gradients(checkpointed=False)
    found, _, again = gradients(contexts=contexts)
    assert again == 2
    assert all(torch.equal(f, p) for f, p in zip(found, plain, strict=True))


def test_a_second_backward_pass_computes_what_the_first_has_used_up():
    backend = CountingBackend()
    layer = Layer(backend)
    x = torch.randn(3, WIDTH).requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False, context_fn=keeping()).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second) and backend.gemms == 3


def test_outside_a_checkpointed_layer_nothing_is_kept():
    outputs, layer = KeptOutputs(), Layer(Backend())
    layer(torch.randn(7, WIDTH))
    with outputs.recording(), torch.no_grad():
        layer(torch.randn(7, WIDTH))
    assert outputs.bytes == 0
