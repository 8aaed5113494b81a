"""Adds LoRA to :class:`NVFP4Linear` through PEFT's custom-module mapping
(peft/tuners/lora/config.py, _register_custom_module)."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import save_file
from torch import nn

from qerl_verl.kernels.nvfp4_lora_linear import nvfp4_lora_linear
from qerl_verl.lora.experts import linear_targets, module_targets
from qerl_verl.lora.targets import all_linear
from qerl_verl.nvfp4.architectures import UnsupportedArchitecture, get_architecture
from qerl_verl.nvfp4.experts import PROJECTIONS, STACKS, NVFP4Experts, is_experts
from qerl_verl.nvfp4.linear import NVFP4Linear


class NVFP4LoraLinear(Linear):
    """Computes y = base(x) + B A x * alpha / r with a frozen NVFP4 base.

    Adapters and state are PEFT's own (peft/tuners/lora/layer.py, Linear). With a single adapter
    without dropout the forward pass is one autograd function; all other cases use PEFT's forward
    pass. Operations that need the weight in 16 bits raise an error with the reason.

    Raises:
        ValueError: an initialization that reads the base weight, or a LoRA variant that is not
            supported.
    """

    def __init__(self, base_layer: NVFP4Linear, adapter_name: str, config: LoraConfig, **kwargs):
        _require_plain(config)
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Returns ``[..., out_features]`` in autocast's dtype, or in the dtype of ``x``.

        Args:
            x: ``[..., in_features]`` floating point.
            args, kwargs: passed on to PEFT's forward pass.
        """
        adapter = self._plain_adapter()
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        scaling = self.scaling[adapter]
        return nvfp4_lora_linear(x, base.packed_weight, base.bias, a, b, scaling, base.backend)

    def _plain_adapter(self) -> str | None:
        """Returns the active adapter if the layer computes exactly base + scaling B A x."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or self.lora_bias[name]:
            return None
        return name if isinstance(self.lora_dropout[name], nn.Identity) else None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError(NO_UNMERGE)


class _ExpertFactors(nn.Module):
    """Holds A or B of a layer's experts.

    There is one float32 parameter ``[E, rows, columns]`` for each of
    :data:`~qerl_verl.nvfp4.experts.STACKS`.
    """

    def __init__(self, shapes: dict[str, tuple[int, int, int]], device: torch.device):
        super().__init__()
        for stack, shape in shapes.items():
            self.register_parameter(stack, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)))


class NVFP4LoraExperts(nn.Module, LoraLayer):
    """Adds a LoRA adapter on each linear of each expert to the frozen NVFP4 experts of a layer.

    PEFT's own layer for experts (peft/tuners/lora/layer.py, ParamWrapper) adds B A to the weights,
    which are packed here. Names and shapes of the parameters are in :mod:`qerl_verl.lora.experts`.

    Raises:
        ValueError: the configuration is not plain LoRA without dropout.
    """

    def __init__(self, base_layer: NVFP4Experts, adapter_name: str, config: LoraConfig, r: int, lora_alpha: int, **_):
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        _require_plain(config)
        for unfit in ("use_rslora", "lora_dropout", "lora_bias"):
            if getattr(config, unfit, None):
                raise ValueError(f"{unfit}={getattr(config, unfit)} is not supported on experts; plain LoRA is")
        self._active_adapter = adapter_name
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Identity()
        self.use_rslora[adapter_name] = self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        count, device, a, b = base_layer.num_experts, base_layer.weight_joined.device, {}, {}
        for stack, projections in STACKS.items():
            rows, columns = base_layer.shape_of(stack)
            a[stack], b[stack] = (count, len(projections) * r, columns), (count, rows // count, r)
        self.lora_A[adapter_name], self.lora_B[adapter_name] = _ExpertFactors(a, device), _ExpertFactors(b, device)
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.hidden_dim, module.hidden_dim

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initializes the adapter as PEFT does for a linear: each A uniform (He) or Gaussian, each
        B zero.
        """
        if init_lora_weights is False:
            return
        for a in self.lora_A[adapter_name].parameters():
            if init_lora_weights is True:
                nn.init.kaiming_uniform_(a.view(-1, a.shape[-1]), a=math.sqrt(5))
            else:
                nn.init.normal_(a, std=1 / self.r[adapter_name])
        for b in self.lora_B[adapter_name].parameters():
            nn.init.zeros_(b)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        """Computes :meth:`NVFP4Experts.forward <qerl_verl.nvfp4.experts.NVFP4Experts.forward>` with
        the adapter.
        """
        base, names = self.get_base_layer(), [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or not names:
            return base(hidden_states, top_k_index, top_k_weights)
        if len(names) > 1:
            raise ValueError(f"experts have one active adapter at a time, not {', '.join(names)}")
        a, b = self.lora_A[names[0]], self.lora_B[names[0]]
        adapter = {stack: (a.get_parameter(stack), b.get_parameter(stack)) for stack in STACKS}
        return base.compute(hidden_states, top_k_index, top_k_weights, adapter, self.scaling[names[0]])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        raise ValueError(NO_UNMERGE)


NO_MERGE = (
    "a LoRA delta is lost when it is rounded to NVFP4: keep the adapter beside the base, or load "
    "it on the 16-bit model and merge there"
)
NO_UNMERGE = "adapters on an NVFP4 base are never merged, so there is nothing to unmerge"


def _require_plain(config: LoraConfig) -> None:
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.lower() != "gaussian":
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} reads the base weight, which is "
            "packed in NVFP4; use True or 'gaussian'"
        )
    for variant in ("use_dora", "use_bdlora", "arrow_config", "alora_invocation_tokens"):
        if getattr(config, variant, None):
            raise ValueError(f"{variant} is not supported on an NVFP4 base; plain LoRA and rsLoRA are")


def tower_of(model: nn.Module) -> str:
    """Returns the prefix of names in a model's vision tower, or an empty text without a tower."""
    try:
        return get_architecture(model.config).vision
    except (AttributeError, UnsupportedArchitecture):
        return ""


def _plain_linears(model: nn.Module) -> frozenset[str]:
    """Returns the full names of the decoder's linears that no base quantizes."""
    try:
        return frozenset(get_architecture(model.config).plain_linears(model.config))
    except (AttributeError, UnsupportedArchitecture):
        return frozenset()


def adaptable_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns full name -> (output, input features) of the linears that can have an adapter.

    The output layer, the vision tower and the linears of delta nets that stay in 16 bits are left
    out. The linears of experts in NVFP4 are among
    them; in a model with experts, linears of MLPs are left out, because PEFT takes their names for
    those of the experts (:meth:`qerl_verl.nvfp4.architectures.Architecture.adaptable`).
    """
    beside_experts, tower = any(is_experts(module) for module in model.modules()), tower_of(model)
    plain = _plain_linears(model)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, NVFP4Experts):
            layers |= {f"{name}.{linear}": shape for linear, shape in module.linear_shapes().items()}
        elif (
            isinstance(module, nn.Linear | NVFP4Linear)
            and module is not output
            and not (beside_experts and name.endswith(PROJECTIONS))
            and not (tower and name.startswith(tower))
            and name not in plain
        ):
            layers[name] = module.out_features, module.in_features
    return layers


def linear_names(model: nn.Module) -> list[str]:
    """Returns the meaning of ``target_modules="all-linear"``: last names of linears, sorted.

    Those of experts are not among them.

    PEFT resolves that word by the class of a layer and would skip :class:`NVFP4Linear`.
    """
    return sorted(all_linear(adaptable_layers(model)))


def register_nvfp4(config: LoraConfig, model: nn.Module | None = None) -> LoraConfig:
    """Registers the wrappers of NVFP4 layers in a LoRA configuration, and returns the same object.

    Args:
        config: configuration of the adapter.
        model: the model that gets the adapter. Where it holds experts in NVFP4, their module
            replaces their linears' names in the configuration, which :func:`published` reverts.
    """
    config._register_custom_module({NVFP4Linear: NVFP4LoraLinear, NVFP4Experts: NVFP4LoraExperts})
    if model is not None and any(isinstance(module, NVFP4Experts) for module in model.modules()):
        config.target_modules = module_targets(config.target_modules)
    return config


def published(config: LoraConfig) -> LoraConfig:
    """Returns a copy of a model's LoRA configuration for a file, with the names of the linears."""
    config = copy.copy(config)
    config.target_modules = linear_targets(config.target_modules)
    return config


def draw_adapter(model: PeftModel, seed: int) -> None:
    """Draws the initial values of a new adapter from ``seed``.

    PEFT draws them when it wraps a layer, and rounds them to the dtype of the base. This function
    draws in float32, on the CPU, layer by layer in the model's order. The values are therefore the
    same for every base, whatever its dtype, quantization and device. The global random state is not
    changed.

    Args:
        model: the parameters of its active adapter become float32. Those on the meta device stay
            there.
        seed: the seed for ``torch.manual_seed``.
    """
    adapter = model.active_adapter
    how = model.peft_config[adapter].init_lora_weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if not isinstance(layer, LoraLayer):
                continue
            parameters = [p for name, p in layer.named_parameters() if "lora_" in name]
            devices = [p.device for p in parameters]
            for parameter in parameters:
                parameter.data = parameter.data.float() if parameter.is_meta else parameter.data.float().cpu()
            layer.reset_lora_parameters(adapter, how)
            for parameter, device in zip(parameters, devices, strict=True):
                parameter.data = parameter.data.to(device)


def save_adapter(folder: str | Path, tensors: dict[str, torch.Tensor], config: LoraConfig, base_model: str) -> None:
    """Writes an adapter in PEFT's format (``adapter_config.json``, ``adapter_model.safetensors``).

    Args:
        folder: created if it is missing; its files are replaced one by one, each atomically.
        tensors: full tensors, with the names of ``peft.get_peft_model_state_dict``.
        config: the adapter's configuration.
        base_model: recorded as ``base_model_name_or_path``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = LoraConfig.from_peft_type(
        **{**config.to_dict(), "base_model_name_or_path": base_model, "inference_mode": True}
    )
    staging = folder / ".adapter_model.safetensors.tmp"
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, staging, metadata={"format": "pt"})
    staging.replace(folder / "adapter_model.safetensors")
    config.save_pretrained(folder)
