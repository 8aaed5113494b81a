"""Gives vLLM's RMSNorm a float32 weight beside the checkpoint's, so that noise is not rounded away.

The neighbours of 1 in bfloat16 are 4e-3 to 8e-3 away, so noise of the schedule's late stages would
be lost when it is added to the weight. The input must not be rounded first either: in bfloat16 it
has 128 mantissas, and multiplying a weight by so few numbers rounds with a bias of 1e-4 of the
weight. The noised norm therefore multiplies in float32 and rounds once::

    y = round(x / rms(x) * (w + z))        vLLM's own operator, given a float32 weight

Without noise the bits are vLLM's:

- Where operators run one by one (``enforce_eager``, the CPU engine), a clean norm is vLLM's own
  code on the checkpoint's weight, which rounds twice: round(round(x / rms(x)) * w).
- Where the model is compiled, both are the formula above, because TorchInductor keeps intermediate
  values in float32, and the float32 copy of a 16-bit weight is exact. CUDA graphs hold addresses,
  not values, so one graph serves both.

A clean norm differs from vLLM's by roundings in two cases: where CUDA graphs are captured without
TorchInductor, and where vLLM is told to use kernels for its norms that TorchInductor does not
generate (``ir_op_priority``). Its weight is the clean one in these cases too. vLLM's all-reduce
that includes a norm (FlashInfer, tensor parallelism on GPUs) takes 16-bit weights, so norms that
receive noise are not fused into it.

vLLM has several classes of norms (:data:`REPLACED`): Gemma's multiplies by 1 + weight, and models
that vLLM runs through transformers' code have classes of their own. A subclass replaces each of
them through ``CustomOp.register_oot``, in QeRL's jobs only. vLLM's own code runs in an engine whose
``additional_config`` does not ask for noise, and in norms of another width than the hidden size (q
and k norms).
"""

from __future__ import annotations

import torch
from torch import nn
from vllm import envs, ir
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.batch_invariant import rms_norm_batch_invariant
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from qerl_verl.aqn.noise import NoiseTarget
from qerl_verl.job import RolloutLayers


def wants_noise(additional_config) -> bool:
    """Returns whether an engine's norms receive noise.

    Args:
        additional_config: vLLM's setting of that name, which holds ``qerl.aqn.enable``.
    """
    layers = RolloutLayers.of_engine(additional_config)
    return layers is not None and layers.noise


class _AfterLoading(QuantizeMethodBase):
    """Tells a layer that its weights are loaded, at the start and after each ``reload_weights``."""

    def create_weights(self, layer: nn.Module, *args, **kwargs) -> None:
        """Does nothing: the norm has created its weight itself."""

    def apply(self, layer: nn.Module, *args, **kwargs):
        return layer(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        live = layer.weight.data.to(torch.float32, copy=True) + layer.qerl_offset
        layer.register_buffer("qerl_weight", live, persistent=False)


class NoisyNorm:
    """Adds a float32 weight to one of vLLM's norms; the first base class of the subclasses.

    Attributes:
        weight: ``[hidden]``, the checkpoint's weight in the model's dtype, without noise.
        qerl_weight: ``[hidden]`` float32, the weight of a noised norm. It is overwritten in place,
            so that captured CUDA graphs see the change. None where the norm is vLLM's own.
    """

    qerl_offset = 0.0
    """Number that the norm adds to ``weight`` before it multiplies."""

    def __init__(self, hidden_size: int, *args, **kwargs) -> None:
        super().__init__(hidden_size, *args, **kwargs)
        self.register_buffer("qerl_weight", None, persistent=False)
        config = get_current_vllm_config()
        has_weight, part = getattr(self, "has_weight", True), getattr(self, "variance_size_override", None)
        if not wants_noise(config.additional_config) or not has_weight or part is not None:
            return
        if config.model_config is not None and config.model_config.get_hidden_size() != hidden_size:
            return
        self.quant_method = _AfterLoading()
        self.qerl_noised = False
        self.qerl_captured = config.compilation_config.cudagraph_mode not in (
            None,
            CUDAGraphMode.NONE,
        )

    def forward_native(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Computes what vLLM's method computes.

        Args:
            x: ``[..., hidden]``.
            residual: ``[..., hidden]`` or None; added to ``x`` before the norm.

        Returns:
            ``[..., hidden]``; with ``residual`` also the sum that was normalized.
        """
        if not self._uses_live_weight():
            return super().forward_native(x, residual)
        weight, epsilon = self.qerl_weight, self.variance_epsilon
        if residual is None:
            return ir.ops.rms_norm(x, weight, epsilon, None)
        return ir.ops.fused_add_rms_norm.maybe_inplace(x, residual, weight, epsilon, None)

    def forward_cuda(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Computes :meth:`forward_native` where the model is not compiled.

        It takes one launch for the norm and one for the sum, because only the batch-invariant one
        of vLLM's kernels takes a float32 weight.
        """
        if not self._uses_live_weight():
            return super().forward_cuda(x, residual)
        if torch.compiler.is_compiling() and not envs.VLLM_BATCH_INVARIANT:
            return self.forward_native(x, residual)
        if residual is None:
            return rms_norm_batch_invariant(x, self.qerl_weight, self.variance_epsilon)
        residual = x + residual
        y = rms_norm_batch_invariant(residual, self.qerl_weight, self.variance_epsilon)
        return y, residual

    def _uses_live_weight(self) -> bool:
        if self.qerl_weight is None:
            return False
        return torch.compiler.is_compiling() or self.qerl_captured or self.qerl_noised

    def noise_target(self) -> NoiseTarget:
        """Returns the norm as a target of :class:`qerl_verl.aqn.noise.NoiseInjector`.

        Raises:
            ValueError: the engine was not asked for noise, so there is no float32 weight.
        """
        if self.qerl_weight is None:
            raise ValueError(
                "the engine's norms are vLLM's own, whose 16-bit weights round the noise away: it "
                "needs additional_config={'qerl': {'noise': True}}, which "
                "qerl.aqn.enable=True sets"
            )
        return NoiseTarget(clean=self.weight, live=self.qerl_weight, switch=self._switch, offset=self.qerl_offset)

    def qerl_reset(self) -> None:
        """Copies ``weight``, after it was read from disk again, without noise."""
        if self.qerl_weight is not None:
            self.qerl_weight.copy_(self.weight.float() + self.qerl_offset)
            self.qerl_noised = False

    def _switch(self, noised: bool) -> None:
        self.qerl_noised = noised


class NoisyRMSNorm(NoisyNorm, RMSNorm):
    """:class:`vllm.model_executor.layers.layernorm.RMSNorm` that receives noise."""


class NoisyGemmaRMSNorm(NoisyNorm, GemmaRMSNorm):
    """:class:`vllm.model_executor.layers.layernorm.GemmaRMSNorm`, which stores its weight minus
    1."""

    qerl_offset = 1.0


REPLACED: dict[type, type[NoisyNorm]] = {RMSNorm: NoisyRMSNorm, GemmaRMSNorm: NoisyGemmaRMSNorm}
"""vLLM's classes of norms -> the subclasses that replace them."""

try:  # vLLM 0.28 has subclasses for models that run through transformers' code
    from vllm.model_executor.models.transformers.fusers.rms_norm import TPAwareGemmaRMSNorm, TPAwareRMSNorm
except ImportError:
    pass
else:

    class NoisyTPAwareRMSNorm(NoisyNorm, TPAwareRMSNorm):
        """vLLM's RMSNorm for transformers' models, whose input is split over tensor-parallel
        ranks."""

    class NoisyTPAwareGemmaRMSNorm(NoisyNorm, TPAwareGemmaRMSNorm):
        """:class:`NoisyTPAwareRMSNorm` for norms that store their weight minus 1."""

        qerl_offset = 1.0

    REPLACED |= {TPAwareRMSNorm: NoisyTPAwareRMSNorm, TPAwareGemmaRMSNorm: NoisyTPAwareGemmaRMSNorm}


def register_norm() -> None:
    """Makes vLLM build the classes of :data:`REPLACED` in this process. A second call changes
    nothing.

    Raises:
        RuntimeError: another plugin has already replaced one of vLLM's norms.
    """
    for stock, ours in REPLACED.items():
        present = op_registry_oot.get(stock.__name__)
        if present is ours:
            continue
        if present is not None:
            raise RuntimeError(
                f"{present.__module__}.{present.__qualname__} has replaced vLLM's "
                f"{stock.__name__}, which QeRL's noise needs for itself: leave that plugin out "
                "with VLLM_PLUGINS"
            )
        name = stock.name
        stock.register_oot(name=stock.__name__)(ours)
        ours.name = name  # the name by which compilation_config.custom_ops enables or disables it
