"""vLLM's RMSNorm with a float32 weight beside the checkpoint's, so that noise acts as it was drawn.

A bfloat16 weight of 1 has neighbours 4e-3 to 8e-3 away, so that noise of the schedule's late stages
is rounded off when it is added to the weight. The input must not be rounded first either: in
bfloat16 it has 128 mantissas, and the products of a weight with so few numbers round with a bias of
1e-4 of the weight. So the noised norm multiplies in float32 and rounds once::

    y = round(x / rms(x) * (w + z))        vLLM's own operator, given a float32 weight

Without noise the bits are vLLM's:

- Where operators run one by one (``enforce_eager``, the CPU engine), a clean norm is vLLM's own
  code on the checkpoint's weight, which rounds twice: round(round(x / rms(x)) * w).
- Where the model is compiled, both are the formula above, for TorchInductor keeps intermediate
  values in float32, and the float32 copy of a 16-bit weight is exact. CUDA graphs hold addresses,
  not values, so one graph serves both.

Where CUDA graphs are captured without TorchInductor, or vLLM is told to call kernels for its norms
that TorchInductor does not write (``ir_op_priority``), a clean norm differs from vLLM's by
roundings; its weight is the clean one all the same. vLLM's all-reduce with a norm in it
(FlashInfer, tensor parallelism on GPUs) takes 16-bit weights, so norms that receive noise stay
outside.

vLLM has several classes of norms (:data:`REPLACED`): Gemma's multiplies by 1 + weight, and models
that vLLM runs through transformers' code have their own. Each gets a subclass, which replaces it
through ``CustomOp.register_oot``, in QeRL's jobs only. An engine whose ``additional_config`` does
not ask for noise runs vLLM's code, and so do norms of another width than the hidden size (q and k
norms).
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
from qerl_verl.rollout.lora import ADDITIONAL_CONFIG


def wants_noise(additional_config) -> bool:
    """Returns whether an engine's norms are to receive noise, from vLLM's ``additional_config``
    (``qerl.aqn.enable``)."""
    return bool((additional_config or {}).get(ADDITIONAL_CONFIG, {}).get("noise"))


class _AfterLoading(QuantizeMethodBase):
    """How vLLM tells a layer that its weights are loaded, at the start and after each
    ``reload_weights``."""

    def create_weights(self, layer: nn.Module, *args, **kwargs) -> None:
        """The norm has created its weight itself."""

    def apply(self, layer: nn.Module, *args, **kwargs):
        return layer(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        live = layer.weight.data.to(torch.float32, copy=True) + layer.qerl_offset
        layer.register_buffer("qerl_weight", live, persistent=False)


class NoisyNorm:
    """An effective weight in float32 for one of vLLM's norms, in front of which it stands.

    Attributes:
        weight: ``[hidden]``, the checkpoint's, in the model's dtype. Noise never touches it.
        qerl_weight: ``[hidden]`` float32, what a noised norm multiplies by; None where the norm is
            vLLM's own. Overwritten in place, so captured CUDA graphs see it.
    """

    qerl_offset = 0.0
    """What the norm adds to ``weight`` before it multiplies."""

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
        """As vLLM's: ``[..., hidden]`` in and out, with ``residual`` also the sum that was
        normalized."""
        if not self._uses_live_weight():
            return super().forward_native(x, residual)
        weight, epsilon = self.qerl_weight, self.variance_epsilon
        if residual is None:
            return ir.ops.rms_norm(x, weight, epsilon, None)
        return ir.ops.fused_add_rms_norm.maybe_inplace(x, residual, weight, epsilon, None)

    def forward_cuda(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`forward_native`, where the model is not compiled, in one launch and one that
        adds: of vLLM's kernels the batch-invariant one takes a float32 weight."""
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
        """For :class:`qerl_verl.aqn.noise.NoiseInjector`.

        Raises:
            ValueError: the engine was not asked for noise, so there is no float32 weight.
        """
        if self.qerl_weight is None:
            raise ValueError(
                "the engine's norms are vLLM's own, whose 16-bit weights round noise off: it needs "
                "additional_config={'qerl': {'noise': True}}, which qerl.aqn.enable=True sets"
            )
        return NoiseTarget(clean=self.weight, live=self.qerl_weight, switch=self._switch, offset=self.qerl_offset)

    def qerl_reset(self) -> None:
        """Takes ``weight`` over after it was read from disk again, without noise."""
        if self.qerl_weight is not None:
            self.qerl_weight.copy_(self.weight.float() + self.qerl_offset)
            self.qerl_noised = False

    def _switch(self, noised: bool) -> None:
        self.qerl_noised = noised


class NoisyRMSNorm(NoisyNorm, RMSNorm):
    """:class:`vllm.model_executor.layers.layernorm.RMSNorm` on which noise acts."""


class NoisyGemmaRMSNorm(NoisyNorm, GemmaRMSNorm):
    """:class:`vllm.model_executor.layers.layernorm.GemmaRMSNorm`, whose weight is stored less 1."""

    qerl_offset = 1.0


REPLACED: dict[type, type[NoisyNorm]] = {RMSNorm: NoisyRMSNorm, GemmaRMSNorm: NoisyGemmaRMSNorm}
"""vLLM's classes of norms, and ours in their places."""

try:  # vLLM 0.28 derives norms of its own for models that run through transformers' code
    from vllm.model_executor.models.transformers.fusers.rms_norm import TPAwareGemmaRMSNorm, TPAwareRMSNorm
except ImportError:
    pass
else:

    class NoisyTPAwareRMSNorm(NoisyNorm, TPAwareRMSNorm):
        """vLLM's RMSNorm for transformers' models, which takes parts of an input from all
        tensor-parallel ranks."""

    class NoisyTPAwareGemmaRMSNorm(NoisyNorm, TPAwareGemmaRMSNorm):
        """The same for norms whose weight is stored less 1."""

        qerl_offset = 1.0

    REPLACED |= {TPAwareRMSNorm: NoisyTPAwareRMSNorm, TPAwareGemmaRMSNorm: NoisyTPAwareGemmaRMSNorm}


def register_norm() -> None:
    """Makes vLLM build the classes of :data:`REPLACED` where its models ask for vLLM's, in this
    process. Idempotent.

    Raises:
        RuntimeError: another plugin has replaced one of vLLM's norms already.
    """
    for stock, ours in REPLACED.items():
        present = op_registry_oot.get(stock.__name__)
        if present is ours:
            continue
        if present is not None:
            raise RuntimeError(
                f"{present.__module__}.{present.__qualname__} has replaced vLLM's {stock.__name__}, which QeRL's "
                "noise needs for itself: leave that plugin out with VLLM_PLUGINS"
            )
        name = stock.name
        stock.register_oot(name=stock.__name__)(ours)
        ours.name = name  # under which compilation_config.custom_ops turns it on or off
