"""Draws the noise, finds the modules that receive it, and applies and removes it."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qerl_verl.config.settings import AQNSettings, Rounding, Unit
from qerl_verl.nvfp4.architectures import Architecture


def draw_noise(seed: int, step: int, layer: str, size: int, sigma: float) -> torch.Tensor:
    """Draws Z ~ N(0, sigma^2 I), one value per hidden channel (QeRL, Eq. 10).

    The result depends on the arguments alone, so every tensor-parallel rank, replica and restart
    draws the same values. NumPy's Philox generator gives the same stream on every machine.

    Args:
        seed: ``qerl.aqn.seed``.
        step: the training step that samples under this noise.
        layer: full name of the norm, e.g. ``model.layers.0.input_layernorm``.
        size: number of hidden channels.
        sigma: standard deviation.

    Returns:
        ``[size]`` float32 on the CPU.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{layer}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
    return torch.from_numpy(generator.standard_normal(size, dtype=np.float32)) * sigma


def find_noise_targets(
    model: nn.Module, architecture: Architecture, fused: dict[str, str], prefix: str | None = None
) -> dict[str, nn.Module]:
    """Returns the norms that receive noise, found by the linears beside them.

    ``architecture.noise_targets`` says which linears a norm of a decoder layer feeds, or is fed by.
    The router and the experts stand in the place of gate and up where a layer has them, and the
    linears of a delta net in the place of q, k and v. A norm is a
    target where it stands beside those linears in the given model, under their own or their fused
    name. The class of the norm does not matter, because an inference engine has its own.

    Args:
        model: the model, or this rank's part of it (a pipeline rank holds some of the layers).
        architecture: wiring of the model's decoder layer.
        fused: linear -> the name under which the model fuses it, e.g.
            ``{"self_attn.q_proj": "self_attn.qkv_proj"}``.
        prefix: what the names of the model's decoder layers begin with; by default the
            architecture's prefix.

    Returns:
        Full name -> norm, in the model's order. Each norm has a ``weight`` ``[hidden]``. Names
        begin as in transformers' model, so that the same noise is drawn where the model has other
        names.

    Raises:
        ValueError: a norm lacks one of the linears that should stand beside it, or there is no
            target.
    """
    modules = dict(model.named_modules())
    prefix = prefix or architecture.layer_prefix
    targets: dict[str, nn.Module] = {}
    experts, delta_nets = architecture.experts, architecture.delta_nets
    for name, module in modules.items():
        for norm, linears in architecture.noise_targets.items():
            if not (name.startswith(prefix) and name.endswith(f".{norm}")):
                continue
            if not isinstance(getattr(module, "weight", None), torch.Tensor):
                continue  # a layer of another pipeline rank
            layer = name[: -len(norm)]
            if experts and layer + experts.module in modules:
                linears = architecture.noise_targets_with_experts[norm]
            elif delta_nets and layer + delta_nets.module in modules:
                linears = architecture.noise_targets_with_delta_nets[norm]
            for linear in linears:
                if layer + linear not in modules and layer + fused.get(linear, linear) not in modules:
                    raise ValueError(f"{name} should stand beside {layer}{linear}, but the model has no such module")
            targets[architecture.layer_prefix + name.removeprefix(prefix)] = module
    if not targets:
        raise ValueError(f"no norm of {architecture.name} found in {type(model).__name__}: nothing to put noise on")
    return targets


def find_router_norms(model: nn.Module, architecture: Architecture, targets: Iterable[str]) -> frozenset[str]:
    """Returns the norms that receive noise and whose output also goes to a router of experts.

    Args:
        model: see :func:`find_noise_targets`.
        architecture: see :func:`find_noise_targets`.
        targets: full names of the norms that receive noise.
    """
    experts = architecture.experts
    if experts is None:
        return frozenset()
    modules = {name for name, _ in model.named_modules()}
    norms = [n for n, fed in architecture.noise_targets_with_experts.items() if experts.router in fed]
    return frozenset(
        name
        for name in targets
        for norm in norms
        if name.endswith(f".{norm}") and name.removesuffix(norm) + experts.module in modules
    )


def _no_switch(noised: bool) -> None:
    """Does nothing, for a norm that always multiplies by its live weight."""


@dataclass(frozen=True)
class NoiseTarget:
    """A norm that receives noise.

    Attributes:
        clean: ``[hidden]``, the checkpoint's weight. It is only read.
        live: ``[hidden]`` float32, the weight that the norm multiplies by. A 16-bit weight would
            round small noise away.
        switch: called with whether ``live`` is noised, for a norm that computes the two cases
            differently.
        offset: number that the norm adds to ``clean`` before it multiplies (1 for Gemma's).

    Raises:
        ValueError: ``live`` is not float32.
    """

    clean: torch.Tensor
    live: torch.Tensor
    switch: Callable[[bool], None] = _no_switch
    offset: float = 0.0

    def __post_init__(self):
        if self.live.dtype != torch.float32:
            raise ValueError(f"noise needs a float32 weight to act on, got {self.live.dtype}")

    def effective(self) -> torch.Tensor:
        """Returns ``[hidden]`` float32 on the CPU, the weight that multiplies without noise."""
        return self.clean.detach().float().cpu() + self.offset


@dataclass(frozen=True)
class Noise:
    """The noise of a training step, as the trainer tells it to the engines.

    Attributes:
        seed: ``qerl.aqn.seed``.
        step: the training step that samples under it.
        sigma: standard deviation, in ``unit``; 0 is no noise.
        unit: ``absolute``, or ``relative`` to the root mean square of each norm's effective weight.
        rounding: ``none``, or ``weight``: the noised weight is rounded to the dtype of the clean
            one.
        router: whether norms that feed a router of experts also receive noise.
    """

    seed: int
    step: int
    sigma: float
    unit: Unit = "absolute"
    rounding: Rounding = "none"
    router: bool = False

    @classmethod
    def of(cls, settings: AQNSettings, step: int, sigma: float) -> Noise:
        """Returns the noise of a step under a run's settings."""
        return cls(settings.seed, step, sigma, settings.unit, settings.rounding, settings.router)


class NoiseInjector:
    """Applies noise to norms and removes it, always starting from the clean weights.

    Args:
        targets: full module name -> norm.
        router_norms: names of the norms that feed a router, see :func:`find_router_norms`.
    """

    def __init__(self, targets: Mapping[str, NoiseTarget], router_norms: Collection[str] = ()):
        self.targets, self._router_norms = dict(targets), frozenset(router_norms)
        self._noised = dict(targets)  # targets of the last noise

    @torch.no_grad()
    def set_noise(self, noise: Noise) -> None:
        """Sets every live weight to the effective one plus the noise of a step.

        With ``sigma`` 0 the result is exactly the effective weight. Live weights are changed in
        place, so captured CUDA graphs see the change.

        Raises:
            FloatingPointError: a noised weight, which the message names, is not finite. No target
                has changed in that case.
        """
        values = {}
        noised = {n: target for n, target in self.targets.items() if noise.router or n not in self._router_norms}
        for name, target in self.targets.items():
            value = target.effective()
            if noise.sigma and name in noised:
                scale = root_mean_square(value) if noise.unit == "relative" else 1.0
                value = value + draw_noise(noise.seed, noise.step, name, value.numel(), noise.sigma * scale)
                if noise.rounding == "weight":
                    value = (value - target.offset).to(target.clean.dtype).float() + target.offset
                if not torch.isfinite(value).all():
                    raise FloatingPointError(
                        f"the noise of step {noise.step} makes {name}.weight non-finite (sigma {noise.sigma})"
                    )
            values[name] = value
        for name, target in self.targets.items():
            target.live.copy_(values[name])
            target.switch(bool(noise.sigma) and name in noised)
        self._noised = noised

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Measures the noise that is in effect, from the live weights.

        Returns:
            ``absolute``: root mean square of live minus clean, over all channels of all targets of
            the last noise;
            ``relative``: the same in units of the root mean square of each target's clean weight;
            ``weight_min``, ``weight_median``, ``weight_max``: over the root mean squares of the
            targets' clean weights.
        """
        absolute, relative, sizes = [], [], []
        for target in self._noised.values():
            clean = target.effective()
            noise = root_mean_square(target.live.detach().cpu() - clean)
            size = root_mean_square(clean)
            absolute.append(noise**2)
            relative.append((noise / size) ** 2 if size else math.inf if noise else 0.0)
            sizes.append(size)
        return {
            "absolute": math.sqrt(statistics.fmean(absolute)),
            "relative": math.sqrt(statistics.fmean(relative)),
            "weight_min": min(sizes),
            "weight_median": statistics.median(sizes),
            "weight_max": max(sizes),
        }


def combine(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combines the measurements of several workers (:meth:`NoiseInjector.measure`).

    Tensor-parallel ranks and replicas measure the same; each pipeline rank measures the norms of
    its own layers.
    """
    combined = {key: math.sqrt(statistics.fmean(m[key] ** 2 for m in measured)) for key in ("absolute", "relative")}
    for key, pick in (("weight_min", min), ("weight_median", statistics.median), ("weight_max", max)):
        combined[key] = pick([m[key] for m in measured])
    return combined


def describe_size(sigmas: Mapping[str, float], unit: str, measured: Mapping[str, float]) -> str:
    """Returns one line that compares the noise with the weights of a model.

    Args:
        sigmas: description of a sigma -> the sigma, in ``unit``, e.g.
            ``{"in the first noisy stage": 0.01}``.
        unit: ``absolute`` or ``relative``.
        measured: see :meth:`NoiseInjector.measure`.
    """
    low, median, high = (measured[f"weight_{which}"] for which in ("min", "median", "max"))
    parts = []
    for where, sigma in sigmas.items():
        if unit == "relative":
            parts.append(f"{100 * sigma:.2g} % {where} ({sigma * median:.2g} on the median norm)")
        else:
            share = sigma / median if median else math.inf
            parts.append(f"{sigma:.2g} {where} ({100 * share:.2g} % of the median norm's)")
    return (
        f"the root mean square of a noised norm's weight is {median:.2g} (median; {low:.2g} to {high:.2g}); sigma is "
        + " and ".join(parts)
    )


def root_mean_square(values: torch.Tensor) -> float:
    """Returns the root mean square, computed in float64."""
    return values.double().square().mean().sqrt().item()
