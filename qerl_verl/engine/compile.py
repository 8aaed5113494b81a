"""Norms and MLPs of the decoder layers, compiled by TorchInductor (verl's ``use_torch_compile``)."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn
from torch.utils._triton import has_triton
from transformers.modeling_layers import GradientCheckpointingLayer

RECOMPILE_LIMIT = 32
"""Of one forward method, in place of PyTorch's 8: with and without autograd, with and without an adapter, batches or sequences of
size 1 (which PyTorch compiles for themselves), and this for every kind of norm that shares the method."""


def unavailable(device: torch.device) -> str | None:
    """Why TorchInductor cannot compile for ``device``, or None if it can."""
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed, or not for this GPU"
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return None
    return f"no C{'' if variable == 'CC' else '++'} compiler: install {names[0]} or set {variable}"


def compile_layers(model: nn.Module, **options) -> str:
    """Have norms and MLPs of every decoder layer compiled, each kind at its first call.

    transformers runs them one operation at a time, and each operation reads and writes the activations of all tokens and rounds
    them to 16 bits. Compiled, several are one kernel that rounds its result alone, as in vLLM, where TorchInductor compiles the same
    layers; so rollout and training come closer, too. The NVFP4 layers stay as they are (``torch.compiler.disable`` on
    their ``forward``), and so does attention, but for the norms in it: compiled with its rotary embedding, it held up the first step by a
    minute, and rollout and training differed more (docs/performance.md).

    Args:
        options: for ``torch.compile``.

    Returns:
        What is compiled, in words.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    names = set()
    for layer in layers:
        children = {name for name, _ in layer.named_children() if "attn" not in name}
        for name, module in layer.named_modules():
            leaf = name.rpartition(".")[2]
            if name in children or "norm" in leaf:
                module.compile(dynamic=True, **options)
                names.add(leaf)
    return f"{', '.join(sorted(names))} of {len(layers)} layers by TorchInductor, each at its first call"
