"""Norms and gated activations, compiled by TorchInductor (verl's ``use_torch_compile``)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable

import torch
from torch import nn
from torch.utils._triton import has_triton

from qerl_verl.lora.peft import tower_of
from qerl_verl.nvfp4.experts import NVFP4Experts
from qerl_verl.nvfp4.experts import gated as plain_gated
from qerl_verl.platform.compilers import missing_compiler

RECOMPILE_LIMIT = 32
"""TorchDynamo's limit of recompilations for one function, in place of PyTorch's 8. A ``forward`` is
compiled with and without autograd, with and without an adapter, and for batches or sequences of
size 1, which PyTorch specializes; all kinds of norms that share it count together.
"""

GATED_MLPS = {
    *("LlamaMLP", "MistralMLP", "Ministral3MLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP"),
    *("Exaone4MLP", "Gemma3MLP", "GraniteMLP", "Olmo2MLP", "Olmo3MLP", "Qwen3VLTextMLP", "Qwen3_5MLP", "SmolLM3MLP"),
}
"""Classes of transformers that compute ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` and
nothing else."""


def unavailable(device: torch.device) -> str | None:
    """Returns why TorchInductor cannot compile for ``device``, or None if it can."""
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        return "TORCH_COMPILE_DISABLE is set"
    if device.type == "cuda" and not has_triton():
        return "Triton is not installed, or not for this GPU"
    return missing_compiler(device.type)


class CompiledMLP(nn.Module):
    """Computes ``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` as :data:`GATED_MLPS` do, with one
    fused kernel between the GEMMs.

    Args:
        mlp: its submodules are adopted under their names, so parameters keep theirs.
        gated: :func:`qerl_verl.nvfp4.experts.gated`, compiled.
    """

    def __init__(self, mlp: nn.Module, gated: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        for name, part in mlp.named_children():
            setattr(self, name, part)
        self._gated = gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the output of the MLP, ``[..., hidden_size]``, for ``x`` of the same shape."""
        return self.down_proj(self._gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))


def compile_layers(model: nn.Module, **options) -> str:
    """Compiles the norms and the gated activation between an MLP's GEMMs, each at its first call.

    transformers runs them one operation at a time. Each operation reads and writes the activations
    of all tokens and rounds them to 16 bits. Compiled, several operations are one kernel that
    rounds its result alone, as in vLLM, where TorchInductor compiles the same parts. Linears are
    left as they are. Attention is too, except for the norms in it: compiling it with its rotary
    embedding takes more than a minute at the first step (docs/performance.md).

    Args:
        model: MLPs of other classes than :data:`GATED_MLPS` are left alone, and so is a vision
            tower.
        options: for ``torch.compile``.

    Returns:
        A description of what is compiled.
    """
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = RECOMPILE_LIMIT
    else:  # of the process; later PyTorch has settings by thread and task, and the argument
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    gated, names = torch.compile(plain_gated, dynamic=True, **options), set()
    tower = tower_of(model)
    for name, module in list(model.named_modules()):
        if tower and name.startswith(tower):
            continue
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, NVFP4Experts):
            module.gated = gated
            names.add(f"{leaf}.act_fn")
        elif type(module).__name__ in GATED_MLPS:
            setattr(model.get_submodule(parent), leaf, CompiledMLP(module, gated))
            names.add(f"{leaf}.act_fn")
        elif "norm" in leaf:
            module.compile(dynamic=True, **options)
            names.add(leaf)
    return f"{', '.join(sorted(names)) or 'nothing'} by TorchInductor, each at its first call"
