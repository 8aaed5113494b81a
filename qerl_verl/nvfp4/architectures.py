"""Which models are supported, and what the rest of the package has to know of each.

One table, for quantization (which linears are packed, which share a global scale), for checkpoint
validation (which tensors there are, in which shape) and for the adaptive noise (which norms it goes
to). docs/models.md explains the columns and how a row is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qerl_verl.nvfp4.errors import CheckpointError

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_MLP = (*_GATE_UP, "mlp.down_proj")
_FUSED_QKV = {"self_attn.qkv_proj": _QKV}
_FUSED_GATE_UP = {"mlp.gate_up_proj": _GATE_UP}
_LLAMA_BIASES = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
_IN_FRONT = {"input_layernorm": _QKV, "post_attention_layernorm": _GATE_UP}
_BEHIND_ALONE = {
    "post_attention_layernorm": ("self_attn.o_proj",),
    "post_feedforward_layernorm": ("mlp.down_proj",),
}
_THROUGH_TRANSFORMERS = (
    "vLLM 0.28 runs the model through transformers' code, where NVFP4 layers on that path stop with "
    "'Current vLLM config is not set'"
)
_NORMED_HEADS = ("self_attn.q_norm", "self_attn.k_norm")

DOCUMENTATION = "docs/models.md"
"""Where a user reads which models there are and how one is added."""


class UnsupportedArchitecture(CheckpointError):
    """The model is none of those in the table, or a variant that transformers and vLLM do not both
    serve."""


@dataclass(frozen=True)
class Fixed:
    """A setting of config.json of which one value alone is served.

    Attributes:
        key: in config.json.
        value: the one that is served; None also stands for False.
        reason: why no other one is, for the message.
    """

    key: str
    value: Any
    reason: str


def _hard_coded(key: str, value: Any) -> Fixed:
    return Fixed(key, value, "vLLM's model is built for this value alone")


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only model.

    Names of linears and norms are relative to a layer, ``{layer_prefix}{i}.``. A projection is one
    of q, k, v, o, gate, up and down; a linear is what the checkpoint holds, which is a projection
    or several of them fused.
    """

    name: str
    """As in ``architectures`` of config.json."""

    layer_prefix: str = "model.layers."

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Linear of the checkpoint -> the projections whose rows it holds, one behind the other."""

    norms_in_front: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _IN_FRONT)
    """Norm -> the projections whose input is exactly this norm's output."""

    norms_behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Norm -> the projection whose output is exactly this norm's input."""

    norm_offset: float = 0.0
    """What a norm adds to its stored weight before it multiplies by it."""

    head_norms: tuple[str, ...] = ()
    """Norms of size ``head_dim``."""

    output_norms: Mapping[str, str] = field(default_factory=dict)
    """Norm -> the projection of whose output it is as wide."""

    biased: tuple[str, ...] = ()
    """Projections that always have a bias."""

    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Boolean of the config -> the projections that have a bias if it is set."""

    fixed: tuple[Fixed, ...] = ()
    """Settings of which one value alone is served."""

    no_vllm_lora: str = ""
    """Why vLLM's own LoRA path does not take adapters of the family; empty where it does."""

    no_punica: str = ""
    """Why NVFP4 layers are not served on that path (``qerl.rollout.lora=punica``), though 16-bit
    layers are."""

    keeps_positions: bool = False
    """Whether transformers' attention layer takes ``position_ids`` and hands none on to the
    attention function. FlashAttention of flash-attn tells the sequences of a packed row apart by
    them."""

    shares_base: bool = False
    """Whether one copy of the base serves actor and rollout (``qerl.base``): vLLM has a model of
    its own for the family, whose layers are the checkpoint's, fused as in :meth:`scale_groups`."""

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears whose weights are packed."""
        return self._linears_of((*_ATTENTION, *_MLP))

    @property
    def shared_scale_groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears that vLLM fuses and the checkpoint does not, and which therefore share one global
        scale."""
        groups = (self._linears_of(group) for group in (_QKV, _GATE_UP))
        return tuple(group for group in groups if len(group) > 1)

    @property
    def noise_targets(self) -> dict[str, tuple[str, ...]]:
        """Norm that receives noise -> the linears beside it: those that it feeds or, where no norm
        feeds any, the one that feeds it."""
        norms = self.norms_in_front or self.norms_behind
        return {norm: self._linears_of(projections) for norm, projections in norms.items()}

    def _linears_of(self, projections: tuple[str, ...]) -> tuple[str, ...]:
        holder = {projection: linear for linear, parts in self.fused.items() for projection in parts}
        return tuple(dict.fromkeys(holder.get(projection, projection) for projection in projections))

    def projections_of(self, linear: str) -> tuple[str, ...]:
        """The projections whose rows a linear holds, in their order."""
        return tuple(self.fused.get(linear, (linear,)))

    def projection_shapes(self, config: Any) -> dict[str, tuple[int, int]]:
        """Projection -> (output, input features).

        Args:
            config: transformers' configuration object (which supplies the defaults of absent keys).
        """
        hidden, inner = config.hidden_size, config.intermediate_size
        head_dim = _head_dim(config)
        q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        return {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def tensor_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the 16-bit checkpoint.

        Args:
            config: transformers' configuration object (which supplies the defaults of absent keys).

        Returns:
            What the model's ``state_dict()`` holds, less ``lm_head.weight`` where embeddings are
            tied.

        Raises:
            UnsupportedArchitecture: ``config`` describes a variant of the model that is not served.
        """
        self._check(config)
        hidden, projections = config.hidden_size, self.projection_shapes(config)
        rows = {
            linear: sum(projections[projection][0] for projection in self.projections_of(linear))
            for linear in self.linears
        }
        columns = {linear: projections[self.projections_of(linear)[0]][1] for linear in self.linears}
        layer = {f"{norm}.weight": (hidden,) for norm in (*self.norms_in_front, *self.norms_behind)}
        layer |= {f"{norm}.weight": (_head_dim(config),) for norm in self.head_norms}
        layer |= {f"{norm}.weight": projections[of][:1] for norm, of in self.output_norms.items()}
        layer |= {f"{linear}.weight": (rows[linear], columns[linear]) for linear in self.linears}
        biased = list(self.biased)
        for switch, parts in self.bias_switches.items():
            biased += parts if getattr(config, switch) else ()
        layer |= {f"{linear}.bias": (rows[linear],) for linear in self._linears_of(tuple(biased))}

        shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
        for i in range(config.num_hidden_layers):
            shapes |= {f"{self.layer_prefix}{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not config.tie_word_embeddings:
            shapes["lm_head.weight"] = (config.vocab_size, hidden)
        return shapes

    def _check(self, config: Any) -> None:
        for setting in self.fixed:
            found = getattr(config, setting.key, None)
            if (found or None) != (setting.value or None):
                raise UnsupportedArchitecture(
                    f"{self.name} with {setting.key}={found} in config.json is not supported, because {setting.reason}: "
                    f"{setting.key}={setting.value}. {DOCUMENTATION} has the table of models."
                )

    def scale_groups(self) -> tuple[tuple[str, ...], ...]:
        """All packed linears, in the groups that share a global scale; a linear that shares with none is alone."""
        shared = {linear for group in self.shared_scale_groups for linear in group}
        return (*self.shared_scale_groups, *((linear,) for linear in self.linears if linear not in shared))


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


_ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("Qwen2ForCausalLM", biased=_QKV, shares_base=True),
        Architecture(
            "Qwen3ForCausalLM",
            bias_switches={"attention_bias": _ATTENTION},
            head_norms=_NORMED_HEADS,
            shares_base=True,
        ),
        Architecture("LlamaForCausalLM", bias_switches=_LLAMA_BIASES, shares_base=True),
        Architecture("MistralForCausalLM", shares_base=True),
        Architecture("Ministral3ForCausalLM", keeps_positions=True, shares_base=True),
        Architecture("SmolLM3ForCausalLM", bias_switches=_LLAMA_BIASES, no_punica=_THROUGH_TRANSFORMERS),
        Architecture("GraniteForCausalLM", bias_switches=_LLAMA_BIASES, shares_base=True),
        Architecture("Phi3ForCausalLM", fused=_FUSED_QKV | _FUSED_GATE_UP, shares_base=True),
        Architecture(
            "Gemma3ForCausalLM",
            norms_in_front={"input_layernorm": _QKV, "pre_feedforward_layernorm": _GATE_UP},
            norms_behind=_BEHIND_ALONE,
            norm_offset=1.0,
            head_norms=_NORMED_HEADS,
            bias_switches={"attention_bias": _ATTENTION},
            fixed=(Fixed("use_bidirectional_attention", False, "a policy has to be causal"),),
            shares_base=True,
        ),
        Architecture(
            "Olmo2ForCausalLM",
            norms_in_front={},
            norms_behind=_BEHIND_ALONE,
            output_norms={"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"},
            bias_switches={"attention_bias": _ATTENTION},
            no_punica=_THROUGH_TRANSFORMERS,
        ),
        Architecture(
            "Olmo3ForCausalLM",
            norms_in_front={},
            norms_behind=_BEHIND_ALONE,
            output_norms={"self_attn.q_norm": "self_attn.q_proj", "self_attn.k_norm": "self_attn.k_proj"},
            fixed=(_hard_coded("attention_bias", False),),
            shares_base=True,
        ),
        Architecture(
            "Glm4ForCausalLM",
            fused=_FUSED_GATE_UP,
            norms_behind={
                "post_self_attn_layernorm": ("self_attn.o_proj",),
                "post_mlp_layernorm": ("mlp.down_proj",),
            },
            bias_switches={"attention_bias": _QKV},
            no_vllm_lora="the checkpoint fuses gate and up, and vLLM's Glm4ForCausalLM takes adapters of gate_proj and up_proj",
            shares_base=True,
        ),
        Architecture(
            "SeedOssForCausalLM",
            biased=_QKV,
            fixed=tuple(
                _hard_coded(key, value)
                for key, value in (("attention_bias", True), ("attention_out_bias", False), ("mlp_bias", False))
            ),
            shares_base=True,
        ),
    )
}


def supported_architectures() -> tuple[str, ...]:
    """The names in the table."""
    return tuple(_ARCHITECTURES)


def get_architecture(hf_config: Any) -> Architecture:
    """The table entry of a model.

    Args:
        hf_config: the content of config.json as a dict, or transformers' configuration object.

    Raises:
        UnsupportedArchitecture: ``architectures`` is absent or names none of the supported models.
    """
    get = hf_config.get if isinstance(hf_config, Mapping) else lambda key: getattr(hf_config, key, None)
    names = get("architectures") or []
    for name in names:
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    found = ", ".join(names) if names else f"none (model_type {get('model_type')})"
    raise UnsupportedArchitecture(
        f"architecture in config.json: {found}. Supported are the dense models {', '.join(_ARCHITECTURES)}; "
        f"mixture-of-experts and multimodal models are not. {DOCUMENTATION} says how a dense model is added."
    )


def logits_divisor(config: Any) -> float:
    """By what a model divides the output of its output layer (Granite's ``logits_scaling``); 1 for
    the others.

    Args:
        config: transformers' configuration object.
    """
    return float(getattr(config, "logits_scaling", None) or 1.0)
