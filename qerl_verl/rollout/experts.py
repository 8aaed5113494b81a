"""Computes the experts of a mixture in vLLM, NVFP4 weights with 16-bit activations, by vLLM's
kernel or ours.

vLLM loads the weights in both cases: ``RoutedExperts`` fills the parameters that
``CompressedTensorsW4A4Nvfp4MoEMethod`` creates, divided among tensor- or expert-parallel ranks. Our
methods are subclasses of that one, so names and layout of the parameters are vLLM's.

An adapter on the experts is in the layer (:mod:`qerl_verl.rollout.expert_lora`) and takes one of
our kernels. vLLM's own LoRA path for experts (vllm/lora/layers/fused_moe.py) serves many adapters
through LoRA requests, which this rollout does not have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch.nn import Parameter
from vllm.config import CUDAGraphMode, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4 import (  # noqa: E501
    CompressedTensorsW4A4Nvfp4MoEMethod,
)

from qerl_verl.kernels.backends import Choice, choose_backend
from qerl_verl.kernels.nvfp4_dequantize import BLOCK_SIZE
from qerl_verl.kernels.nvfp4_experts import ExpertAdapter, ExpertStack, expert_factors, route_softmax
from qerl_verl.nvfp4.candidates import ExpertsKernel, VLLMKernel, expert_candidates
from qerl_verl.rollout.expert_lora import attach_expert_adapter, expert_adapter
from qerl_verl.rollout.lora import LoraSettings
from qerl_verl.rollout.scheme import SETTING, KernelReport

_INPUT_SCALES = ("w13_input_global_scale", "w2_input_global_scale")
_SERVED = {
    "apply_router_weight_on_input": False,
    "swiglu_limit": None,
    "use_grouped_topk": False,
    "scoring_func": "softmax",
    "custom_routing_function": None,
    "e_score_correction_bias": None,
    "routed_scaling_factor": 1.0,
}
"""Attribute of vLLM's ``RoutedExperts`` -> the only value that our kernels compute."""


@dataclass(frozen=True)
class Experts:
    """The decisions about the experts of one layer.

    Attributes:
        name: full name of the layer in vLLM.
        choice: the chosen kernel.
        device: where the experts compute.
        lora: the adapter in the layers, or None.
        input_scales: whether the checkpoint has scales for quantized activations (W4A4), which are
            loaded and dropped.
        report: report of the engine.
    """

    name: str
    choice: Choice
    device: torch.device
    lora: LoraSettings | None
    input_scales: bool
    report: KernelReport


def experts_method(
    layer: RoutedExperts,
    name: str,
    device: torch.device,
    kernel: str,
    lora: LoraSettings | None,
    input_scales: bool,
    report: KernelReport,
) -> FusedMoEMethodBase:
    """Returns vLLM's ``quant_method`` for the experts of a layer, which vLLM requests while it
    builds them.

    Args:
        layer: the layer under construction, with its configuration and attributes.
        name: its full name.
        device: where it computes.
        kernel: ``qerl.rollout.kernel``.
        lora: the adapter in the layers, or None.
        input_scales: whether the checkpoint is W4A4.
        report: report of the engine.

    Raises:
        ValueError: the configuration asks for something that is not served; names the layer and the
            setting.
    """
    moe = layer.moe_config
    inner = moe.intermediate_size_per_partition
    if inner % BLOCK_SIZE:
        raise ValueError(
            f"{name}: {inner} intermediate channels per tensor-parallel rank are not a multiple of "
            f"{BLOCK_SIZE}: choose another actor_rollout_ref.rollout.tensor_model_parallel_size"
        )
    if moe.is_lora_enabled:
        raise ValueError(
            f"{name}: qerl.rollout.lora=punica does not serve experts in NVFP4; use "
            "qerl.rollout.lora=inline, whose adapter is in the layers"
        )
    graphs = get_current_vllm_config().compilation_config.cudagraph_mode
    choice = choose_backend(
        device,
        (2 * inner, moe.hidden_dim),
        layer.params_dtype,
        kernel,
        setting=SETTING,
        layer=name,
        candidates=expert_candidates(graphs not in (None, CUDAGraphMode.NONE), bool(lora and lora.experts)),
    )
    experts = Experts(name, choice, device, lora, input_scales, report)
    if not isinstance(choice.backend, ExpertsKernel):
        return VLLMExpertsMethod(experts, moe)
    if reason := _refusal(layer):
        raise ValueError(f"{name}: {reason}, which the {choice.backend.name} kernel for experts does not compute")
    return QeRLExpertsMethod(experts, moe)


def _refusal(layer: RoutedExperts) -> str | None:
    moe = layer.moe_config
    if moe.activation.value != "silu":
        return f"the activation is {moe.activation.value}"
    if moe.has_bias:
        return "the experts have biases"
    if moe.moe_parallel_config.use_all2all_kernels:
        return "tokens are exchanged between expert-parallel ranks (data parallelism)"
    for name, value in _SERVED.items():
        found = getattr(layer, name)
        if found is not value and found != value:
            return f"{name} is {found}"
    return None


class _NVFP4Experts(CompressedTensorsW4A4Nvfp4MoEMethod):
    """Does what both methods share: loading, and the line that counts layers."""

    experts: Experts

    def create_weights(self, layer: RoutedExperts, *args, **kwargs) -> None:
        """Creates vLLM's parameters, with those for activation scales where the checkpoint has
        some.

        vLLM's reload counts the loaded parameters of a layer, and holds back a layer that misses
        one.
        """
        super().create_weights(layer, *args, **kwargs)
        if not self.experts.input_scales:
            self._drop_input_scales(layer)
        self.experts.report.built()

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Prepares the loaded weights, at the start and after each reload of the base.

        A reload follows a sleep at level 2 (vllm/model_executor/model_loader/reload). vLLM then
        copies the new values into the first parameters, whose addresses CUDA graphs hold.
        """
        self._prepare(layer)
        self._drop_input_scales(layer)
        experts = self.experts
        experts.report.loaded(experts.name, experts.choice, experts.device, experts.lora)

    def _prepare(self, layer: RoutedExperts) -> None:
        raise NotImplementedError

    @staticmethod
    def _drop_input_scales(layer: RoutedExperts) -> None:
        for name in _INPUT_SCALES:
            if hasattr(layer, name):
                delattr(layer, name)


class QeRLExpertsMethod(_NVFP4Experts):
    """Computes experts on one of our kernels, with the weights as the checkpoint has them.

    Args:
        experts: the decisions, whose backend is one of ours
            (:class:`~qerl_verl.rollout.candidates.ExpertsKernel`).
        moe: vLLM's configuration of the layer.
    """

    use_global_sf = False
    group_size = BLOCK_SIZE

    def __init__(self, experts: Experts, moe):
        FusedMoEMethodBase.__init__(self, moe)  # vLLM's constructor would choose a kernel of vLLM's
        self.experts, self._runner = experts, None

    def create_weights(self, layer: RoutedExperts, *args, **kwargs) -> None:
        super().create_weights(layer, *args, **kwargs)
        lora, moe = self.experts.lora, self.moe
        if lora and lora.experts:
            rank = self.experts.choice.backend.padded_rank(lora.rank)
            sizes = moe.num_local_experts, moe.hidden_dim, moe.intermediate_size_per_partition, rank
            adapter = ExpertAdapter.zeros(*sizes, lora.scaling, layer.params_dtype, self.experts.device)
            attach_expert_adapter(layer, self.experts.name, adapter)

    @property
    def supports_eplb(self) -> bool:
        return False

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM leaves the routing to this method. vLLM's routers have kernels for GPUs
        only.
        """
        return self.experts.device.type == "cpu"

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """Returns None, because no kernel of vLLM is configured."""

    def _prepare(self, layer: RoutedExperts) -> None:
        factors = expert_factors(layer.w13_weight_global_scale.data, layer.w2_weight_global_scale.data)
        for name, factor in zip(("w13", "w2"), factors, strict=True):
            layer.register_parameter(f"qerl_{name}_factors", Parameter(factor, requires_grad=False))
        self._offer_choices()
        adapter = expert_adapter(layer)
        self._kernel().warm_up(*self._stacks(layer), layer.top_k, layer.params_dtype, adapter)

    def _kernel(self) -> ExpertsKernel:
        return cast(ExpertsKernel, self.experts.choice.backend)

    @staticmethod
    def _stacks(layer: RoutedExperts) -> tuple[ExpertStack, ExpertStack]:
        return (
            ExpertStack(layer.w13_weight_packed, layer.w13_weight_scale, layer.qerl_w13_factors),
            ExpertStack(layer.w2_weight_packed, layer.w2_weight_scale, layer.qerl_w2_factors),
        )

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts=None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps ``[T, H]`` to ``[T, H]``; with tensor or expert parallelism, to a part of the sum
        over ranks.

        vLLM's runner runs shared experts beside a method that has no ``moe_kernel``.
        """
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        return self._kernel().experts(x, topk_weights, topk_ids, *self._stacks(layer), expert_adapter(layer))

    def apply_monolithic(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Calls :meth:`apply` with the experts that ``router_logits`` ``[T, E]`` choose."""
        weights, chosen = route_softmax(router_logits, layer.top_k, layer.renormalize)
        capture = getattr(self._runner, "capture_fn", None)
        if capture is not None:
            capture(chosen)
        return self.apply(layer, x, weights, chosen)

    def _offer_choices(self) -> None:
        """Lets vLLM record which experts this method chooses (``enable_return_routed_experts``).

        vLLM asks the routers for them, and a method that routes only if its kernel is one of vLLM's
        own. A module with a layer's number and a ``capture_fn`` reports by itself (fused_moe/
        routed_experts_capturer.py, RoutedExpertsCaptureSource); the layer's runner becomes one.
        """
        config = get_current_vllm_config_or_none()
        if self._runner is None and self.is_monolithic and config is not None:
            self._runner = config.compilation_config.static_forward_context.get(self.experts.name)
            if self._runner is not None:
                self._runner.capture_fn = None


class VLLMExpertsMethod(_NVFP4Experts):
    """Computes experts on the kernel that vLLM chooses for 16-bit activations, Marlin.

    Args:
        experts: the decisions.
        moe: vLLM's configuration of the layer.
    """

    def __init__(self, experts: Experts, moe):
        super().__init__(moe, experts.name, use_a16=True)
        self.experts = replace(experts, choice=replace(experts.choice, backend=VLLMKernel(self.experts_cls.__name__)))

    def _prepare(self, layer: RoutedExperts) -> None:
        """Prepares vLLM's kernel, with three fixes.

        - vLLM uses gate's global scale for up as well; the ratio of the two goes into down's.
        - vLLM 0.24 keeps the factors of the global scales as plain attributes, which a reload does
          not copy to where CUDA graphs read them.
        - After a reload vLLM would make a second kernel on the tensors of the reload, which are
          copied into the first one's and would stay in memory beside them.
        """
        for name in _INPUT_SCALES:
            if not hasattr(layer, name):  # read, and not used without quantized activations
                setattr(layer, name, torch.ones(1, device=layer.w13_weight_packed.device))
        gate, up = layer.w13_weight_global_scale.data.unbind(1)
        layer.w2_weight_global_scale.data.mul_(up / gate)
        up.copy_(gate)
        first, config = self.moe_kernel, self.moe_quant_config
        CompressedTensorsW4A4Nvfp4MoEMethod.process_weights_after_loading(self, layer)
        for name in ("w13_weight_scale_2", "w2_weight_scale_2"):
            factor = getattr(layer, name)
            if not isinstance(factor, Parameter):
                delattr(layer, name)
                layer.register_parameter(name, Parameter(factor, requires_grad=False))
        if first is not None:
            self.moe_kernel, self.moe_quant_config = first, config
