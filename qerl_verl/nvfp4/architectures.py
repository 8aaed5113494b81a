"""Which models are supported, and what the rest of the package has to know of each.

One table, for quantization (which linears are packed, which share a global scale), for checkpoint validation
(which tensors there are, in which shape) and for the adaptive noise (which norm feeds which linears).
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


class UnsupportedArchitecture(CheckpointError):
    """The model is none of those in the table."""


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only model. Names of linears and norms are relative to a layer, ``{layer_prefix}{i}.``"""

    name: str
    """As in ``architectures`` of config.json."""

    layer_prefix: str = "model.layers."

    linears: tuple[str, ...] = (*_ATTENTION, *_MLP)
    """The linears whose weights are packed."""

    shared_scale_groups: tuple[tuple[str, ...], ...] = (_QKV, _GATE_UP)
    """Linears that vLLM fuses, and which therefore share one global scale."""

    noise_targets: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"input_layernorm": _QKV, "post_attention_layernorm": _GATE_UP}
    )
    """Norm -> the linears whose input is exactly this norm's output."""

    biased: tuple[str, ...] = ()
    """Linears that always have a bias."""

    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Boolean of the config -> the linears that have a bias if it is set."""

    head_norms: tuple[str, ...] = ()
    """Norms of size ``head_dim``."""

    def tensor_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the 16-bit checkpoint.

        Args:
            config: transformers' configuration object (which supplies the defaults of absent keys).

        Returns:
            What the model's ``state_dict()`` holds, less ``lm_head.weight`` where embeddings are tied.
        """
        hidden, inner = config.hidden_size, config.intermediate_size
        head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
        q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        linear_shapes = {
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        layer = {f"{norm}.weight": (hidden,) for norm in self.noise_targets}
        layer |= {f"{norm}.weight": (head_dim,) for norm in self.head_norms}
        layer |= {f"{linear}.weight": linear_shapes[linear] for linear in self.linears}
        biased = list(self.biased)
        for switch, linears in self.bias_switches.items():
            biased += linears if getattr(config, switch) else ()
        layer |= {f"{linear}.bias": linear_shapes[linear][:1] for linear in biased}

        shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
        for i in range(config.num_hidden_layers):
            shapes |= {f"{self.layer_prefix}{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not config.tie_word_embeddings:
            shapes["lm_head.weight"] = (config.vocab_size, hidden)
        return shapes

    def scale_groups(self) -> tuple[tuple[str, ...], ...]:
        """All packed linears, in the groups that share a global scale; a linear that shares with none is alone."""
        shared = {linear for group in self.shared_scale_groups for linear in group}
        return (*self.shared_scale_groups, *((linear,) for linear in self.linears if linear not in shared))


_ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("Qwen2ForCausalLM", biased=_QKV),
        Architecture(
            "Qwen3ForCausalLM",
            bias_switches={"attention_bias": _ATTENTION},
            head_norms=("self_attn.q_norm", "self_attn.k_norm"),
        ),
        Architecture("LlamaForCausalLM", bias_switches={"attention_bias": _ATTENTION, "mlp_bias": _MLP}),
        Architecture("MistralForCausalLM"),
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
        "mixture-of-experts and multimodal models are not."
    )
