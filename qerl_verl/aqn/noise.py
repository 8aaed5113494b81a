"""The noise itself: which modules it goes to, what is drawn, and how it is put on and taken off."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qerl_verl.nvfp4.architectures import Architecture


def draw_noise(seed: int, step: int, layer: str, size: int, sigma: float) -> torch.Tensor:
    """Z ~ N(0, sigma^2 I), one value per hidden channel (QeRL, Eq. 10).

    A function of its arguments alone: every tensor-parallel rank, replica and restart draws the
    same. NumPy's Philox generator gives the same stream on every machine.

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


def find_noise_targets(
    model: nn.Module, architecture: Architecture, fused: dict[str, str], prefix: str | None = None
) -> dict[str, nn.Module]:
    """Returns the norms that receive noise, found by the linears beside them.

    ``architecture.noise_targets`` says which norm of a decoder layer feeds, or is fed by, which
    linears; the router and the experts stand in the place of gate and up where a layer has them. A
    norm counts where it stands beside those linears in the model at hand, under their
    own or their fused name; the class of the norm does not matter (an inference engine has its
    own).

    Args:
        model: the model or this rank's part of it (a pipeline rank holds some of the layers).
        architecture: wiring of the model's decoder layer.
        fused: names under which the model fuses linears, e.g.
            ``{"self_attn.q_proj": "self_attn.qkv_proj"}``.
        prefix: with which the model begins the names of its decoder layers, by default the
            architecture's.

    Returns:
        Full name to norm, in the model's order. Each has a ``weight`` [hidden]. Names begin as in
        transformers' model, so the same noise is drawn wherever the model's are others.

    Raises:
        ValueError: a norm without one of the linears that should stand beside it, or no target at
            all.
    """
    modules = dict(model.named_modules())
    prefix = prefix or architecture.layer_prefix
    targets: dict[str, nn.Module] = {}
    experts = architecture.experts
    for name, module in modules.items():
        for norm, linears in architecture.noise_targets.items():
            if not (name.startswith(prefix) and name.endswith(f".{norm}")):
                continue
            if not isinstance(getattr(module, "weight", None), torch.Tensor):
                continue  # another pipeline rank's layer
            layer = name[: -len(norm)]
            if experts and layer + experts.module in modules:
                linears = architecture.noise_targets_with_experts[norm]
            for linear in linears:
                if layer + linear not in modules and layer + fused.get(linear, linear) not in modules:
                    raise ValueError(f"{name} should stand beside {layer}{linear}, but the model has no such module")
            targets[architecture.layer_prefix + name.removeprefix(prefix)] = module
    if not targets:
        raise ValueError(f"no norm of {architecture.name} found in {type(model).__name__}: nothing to put noise on")
    return targets


def find_router_norms(model: nn.Module, architecture: Architecture, targets: Iterable[str]) -> frozenset[str]:
    """Those of the norms that receive noise whose output also goes to a router of experts.

    Args:
        model: see :func:`find_noise_targets`.
        architecture: see :func:`find_noise_targets`.
        targets: full names, as from :func:`find_noise_targets`.
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
    """For a norm that always multiplies by its live weight."""


@dataclass(frozen=True)
class NoiseTarget:
    """A norm that receives noise.

    Attributes:
        clean: ``[hidden]``, the checkpoint's weight. Only read.
        live: ``[hidden]`` float32, what the norm multiplies by. A 16-bit weight would round small
            noise off.
        switch: called with whether ``live`` is noised, for a norm that computes the two in
            different ways.
        offset: what the norm adds to ``clean`` before it multiplies (1 for Gemma's).
    """

    clean: torch.Tensor
    live: torch.Tensor
    switch: Callable[[bool], None] = _no_switch
    offset: float = 0.0

    def __post_init__(self):
        if self.live.dtype != torch.float32:
            raise ValueError(f"noise needs a float32 weight to act on, got {self.live.dtype}")

    def effective(self) -> torch.Tensor:
        """Returns ``[hidden]`` float32 on the CPU: what the norm multiplies by without noise."""
        return self.clean.detach().float().cpu() + self.offset


class NoiseInjector:
    """Puts noise on norms and takes it off, always from the clean weights.

    Args:
        targets: full module name -> norm.
        router_norms: names of those that feed a router, see :func:`find_router_norms`.
    """

    def __init__(self, targets: Mapping[str, NoiseTarget], router_norms: Collection[str] = ()):
        self.targets, self._router_norms = dict(targets), frozenset(router_norms)
        self._noised = dict(targets)  # those that the last noise was for

    @torch.no_grad()
    def set_noise(
        self,
        seed: int,
        step: int,
        sigma: float,
        unit: str = "absolute",
        rounding: str = "none",
        router: bool = False,
    ) -> None:
        """Makes every live weight the effective one plus the noise of ``step``; with ``sigma`` 0
        exactly the effective one.

        In place, so captured CUDA graphs see it.

        Args:
            seed: see :func:`draw_noise`.
            step: see :func:`draw_noise`.
            sigma: standard deviation, in ``unit``.
            unit: ``absolute``, or ``relative``: to the root mean square of each norm's effective
                weight.
            rounding: ``none``, or ``weight``: the sum is rounded to the dtype of the clean weight.
            router: whether norms that feed a router receive noise, too.

        Raises:
            FloatingPointError: a noised weight is not finite; the message names it. No target has
                changed then.
        """
        values = {}
        noised = {n: target for n, target in self.targets.items() if router or n not in self._router_norms}
        for name, target in self.targets.items():
            value = target.effective()
            if sigma and name in noised:
                scale = root_mean_square(value) if unit == "relative" else 1.0
                value = value + draw_noise(seed, step, name, value.numel(), sigma * scale)
                if rounding == "weight":
                    value = (value - target.offset).to(target.clean.dtype).float() + target.offset
                if not torch.isfinite(value).all():
                    raise FloatingPointError(f"the noise of step {step} makes {name}.weight non-finite (sigma {sigma})")
            values[name] = value
        for name, target in self.targets.items():
            target.live.copy_(values[name])
            target.switch(bool(sigma) and name in noised)
        self._noised = noised

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Returns what acts: standard deviation of the noise, read back from the live weights.

        Returns:
            ``absolute``: root mean square of live minus clean over all channels of all targets that
            the last noise was for;
            ``relative``: the same in units of the root mean square of each target's clean weight;
            ``weight_min``, ``weight_median``, ``weight_max``: of those root mean squares over the
            targets.
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
    """Returns one measurement of several workers' (:meth:`NoiseInjector.measure`). Tensor-parallel
    ranks and replicas measure the same; pipeline ranks, each the norms of its own layers."""
    combined = {key: math.sqrt(statistics.fmean(m[key] ** 2 for m in measured)) for key in ("absolute", "relative")}
    for key, pick in (("weight_min", min), ("weight_median", statistics.median), ("weight_max", max)):
        combined[key] = pick([m[key] for m in measured])
    return combined


def describe_size(sigmas: Mapping[str, float], unit: str, measured: Mapping[str, float]) -> str:
    """Returns how large noise is on a model, in one line.

    Args:
        sigmas: what is said of a sigma -> the sigma, in ``unit``, e.g.
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
    """In float64."""
    return values.double().square().mean().sqrt().item()
