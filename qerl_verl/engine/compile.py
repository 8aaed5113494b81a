"""Norms and activation functions of the decoder layers, compiled by TorchInductor (verl's ``use_torch_compile``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers.modeling_layers import GradientCheckpointingLayer

RECOMPILE_LIMIT = 32
"""Of one function, in place of PyTorch's 8: with and without autograd, with and without an adapter, batches or sequences of size 1
(which PyTorch compiles for themselves), and this for every kind of norm that shares a ``forward``."""

MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""Children of a gated MLP of transformers (models/llama/modeling_llama.py, LlamaMLP)."""


def unavailable(device: torch.device) -> str | None:
    """Why TorchInductor cannot compile for ``device``, or None if it can."""
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed, or not for this GPU"
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return None
    return f"no C{'' if variable == 'CC' else '++'} compiler: install {names[0]} or set {variable}"


def _gated(act_fn: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return act_fn(gate) * up


class CompiledMLP(nn.Module):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))``, as transformers' gated MLPs compute it, with one kernel between the products.

    Args:
        mlp: its parts are taken over under their names, so parameters keep theirs.
        gated: :func:`_gated`, compiled.
    """

    def __init__(self, mlp: nn.Module, gated: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        for name, part in mlp.named_children():
            setattr(self, name, part)
        self._gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Args: x: ``[..., hidden_size]``. Returns: of the same shape."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(self._gated(self.act_fn, gate, up))


def compile_layers(model: nn.Module, **options) -> str:
    """Have every decoder layer's norms compiled, and what its MLP does between its products; each at its first call.

    transformers runs them one operation at a time, and each operation reads and writes the activations of all tokens and rounds
    them to 16 bits. Compiled, several are one kernel that rounds its result alone, as in vLLM, where TorchInductor compiles the same
    layers; so rollout and training come closer, too. Linears stay as they are, and so does attention, but for the norms in it:
    compiled with its rotary embedding, it held up the first step by a minute, and rollout and training differed more
    (docs/performance.md).

    Args:
        model: MLPs with other children than :data:`MLP_PARTS` are left alone.
        options: for ``torch.compile``.

    Returns:
        What is compiled, in words.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    gated, names = torch.compile(_gated, dynamic=True, **options), set()
    for layer in layers:
        for name, child in list(layer.named_children()):
            if {n for n, _ in child.named_children()} == MLP_PARTS:
                setattr(layer, name, CompiledMLP(child, gated))
                names.add(f"{name}.act_fn")
        for name, module in layer.named_modules():
            leaf = name.rpartition(".")[2]
            if "norm" in leaf:
                module.compile(dynamic=True, **options)
                names.add(leaf)
    return f"{', '.join(sorted(names))} of {len(layers)} layers by TorchInductor, each at its first call"
