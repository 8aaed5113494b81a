"""The noise itself: which modules it goes to, what is drawn, and how it is put on and taken off."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn

from qerl_verl.nvfp4.architectures import Architecture


def draw_noise(seed: int, step: int, layer: str, size: int, sigma: float) -> torch.Tensor:
    """Z ~ N(0, sigma^2 I), one value per hidden channel (QeRL, Eq. 10).

    A function of its arguments alone: every tensor-parallel rank, replica and restart draws the same. NumPy's
    Philox generator gives the same stream on every machine.

    Args:
        seed: ``qerl.aqn.seed``.
        step: the training step that samples under this noise.
        layer: full name of the norm, e.g. ``model.layers.0.input_layernorm``.
        size: hidden channels.
        sigma: standard deviation.

    Returns:
        ``[size]`` float32 on the CPU.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{layer}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
    return torch.from_numpy(generator.standard_normal(size, dtype=np.float32)) * sigma


def find_noise_targets(model: nn.Module, architecture: Architecture, fused: dict[str, str]) -> dict[str, nn.Parameter]:
    """The norm weights that receive noise, found by what they feed.

    ``architecture.noise_targets`` says which norm of a decoder layer is the input of which linears. A norm counts
    where it stands beside those linears in the model at hand, under their own or their fused name; the class of the
    norm does not matter (an inference engine has its own).

    Args:
        model: the model or this rank's part of it (a pipeline rank holds some of the layers).
        architecture: wiring of the model's decoder layer.
        fused: names under which the model fuses linears, e.g. ``{"self_attn.q_proj": "self_attn.qkv_proj"}``.

    Returns:
        Full module name to weight ``[hidden]``, in the model's order.

    Raises:
        ValueError: a norm without one of the linears it should feed, or of another width, or no target at all.
    """
    modules = dict(model.named_modules())
    targets: dict[str, nn.Parameter] = {}
    for name, module in modules.items():
        for norm, linears in architecture.noise_targets.items():
            if not (name.startswith(architecture.layer_prefix) and name.endswith(f".{norm}")):
                continue
            weight = getattr(module, "weight", None)
            if not isinstance(weight, torch.Tensor):
                continue  # another pipeline rank's layer
            layer = name[: -len(norm)]
            for linear in linears:
                if layer + linear not in modules and layer + fused.get(linear, linear) not in modules:
                    raise ValueError(f"{name} should feed {layer}{linear}, but the model has no such module")
            targets[name] = weight
    if not targets:
        raise ValueError(f"no norm of {architecture.name} found in {type(model).__name__}: nothing to put noise on")
    return targets


class NoiseInjector:
    """Puts noise on norm weights and takes it off, always from a clean copy.

    Args:
        targets: name to weight, see :func:`find_noise_targets`. The weights must be clean now: they are copied to the CPU.
    """

    def __init__(self, targets: dict[str, torch.Tensor]):
        self._targets = targets
        self._clean = {name: weight.detach().to("cpu", copy=True) for name, weight in targets.items()}

    @torch.no_grad()
    def set_noise(self, seed: int, step: int, sigma: float) -> None:
        """Make every target its clean value plus the noise of ``step``; with ``sigma`` 0, bit for bit its clean value.

        In place, so captured CUDA graphs see it.

        Raises:
            FloatingPointError: a noised weight is not finite; the message names it. No target has changed then.
        """
        values = {}
        for name, clean in self._clean.items():
            value = clean
            if sigma:
                value = (clean.float() + draw_noise(seed, step, name, clean.numel(), sigma)).to(clean.dtype)
                if not torch.isfinite(value).all():
                    raise FloatingPointError(f"the noise of step {step} makes {name}.weight non-finite (sigma {sigma})")
            values[name] = value
        for name, weight in self._targets.items():
            weight.data.copy_(values[name])
