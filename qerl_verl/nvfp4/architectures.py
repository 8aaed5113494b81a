"""Lists the supported models, with what the rest of the package has to know about each.

One table serves quantization (which linears are packed, and which share a global scale), checkpoint
validation (which tensors there are, in which shape) and adaptive noise (which norms it goes to).
docs/models.md explains the columns and how to add a row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qerl_verl.nvfp4.errors import CheckpointError

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_ATTENTION = (*_QKV, "self_attn.o_proj")
_DELTA_QKV = ("linear_attn.q", "linear_attn.k", "linear_attn.v")
_DELTA_IN = (*_DELTA_QKV, "linear_attn.in_proj_z")
_DELTA_NET = (*_DELTA_IN, "linear_attn.out_proj")
_MLP = (*_GATE_UP, "mlp.down_proj")
_FUSED_QKV: dict[str, tuple[str, ...]] = {"self_attn.qkv_proj": _QKV}
_FUSED_GATE_UP: dict[str, tuple[str, ...]] = {"mlp.gate_up_proj": _GATE_UP}
_LLAMA_BIASES = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
_IN_FRONT = {"input_layernorm": _QKV, "post_attention_layernorm": _GATE_UP}
_BEHIND_ALONE = {
    "post_attention_layernorm": ("self_attn.o_proj",),
    "post_feedforward_layernorm": ("mlp.down_proj",),
}
_THROUGH_TRANSFORMERS = (
    "vLLM 0.28 runs the model through transformers' code, where NVFP4 layers on that path stop "
    "with 'Current vLLM config is not set'"
)
_NO_PUNICA_WITH_DELTA_NETS = "it has not been tried with NVFP4 layers in delta nets"
_NORMED_HEADS = ("self_attn.q_norm", "self_attn.k_norm")

DOCUMENTATION = "docs/models.md"
"""Page that lists the models and explains how to add one."""


class UnsupportedArchitecture(CheckpointError):
    """The model is not in the table, or is a variant that transformers and vLLM do not both
    serve."""


@dataclass(frozen=True)
class Fixed:
    """A setting of config.json with a single supported value.

    Attributes:
        key: the key in config.json.
        value: the supported value; None also stands for False.
        reason: why no other value is supported, for the message.
        same: other values that mean the same, as None for an absent key.
    """

    key: str
    value: Any
    reason: str
    same: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Experts:
    """The MLPs of a mixture of experts: a router chooses some of them for each token.

    Expert ``E`` of a layer has the linears ``{module}.{E}.gate_proj``, ``up_proj`` and
    ``down_proj`` in a checkpoint, as transformers and llm-compressor write it. transformers holds
    the experts of a layer as ``{module}.gate_up_proj`` ``[E, 2 I, H]`` and ``{module}.down_proj``
    ``[E, H, I]``.

    Attributes:
        is_layer: takes the configuration and a layer's index, and returns whether the layer has
            experts; the other layers have one MLP.
        module, router: names in a layer. The router is a linear that stays in 16 bits.
        count, chosen, inner: keys of the configuration: the number of experts, the number of
            experts of a token, and the output features of gate and up.
    """

    is_layer: Callable[[Any, int], bool]
    module: str = "mlp.experts"
    router: str = "mlp.gate"
    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    inner: str = "moe_intermediate_size"

    def linears(self, config: Any) -> Iterator[tuple[str, str, str]]:
        """Yields the names of gate, up and down of each expert, relative to a layer."""
        for expert in range(getattr(config, self.count)):
            gate, up, down = (f"{self.module}.{expert}.{name}" for name in EXPERT_LINEARS)
            yield gate, up, down

    def stacked_shapes(self, config: Any) -> dict[str, tuple[int, int, int]]:
        """Returns name in a layer -> shape of transformers' parameters."""
        count, inner = getattr(config, self.count), getattr(config, self.inner)
        hidden = config.hidden_size
        return {
            f"{self.module}.gate_up_proj": (count, 2 * inner, hidden),
            f"{self.module}.down_proj": (count, hidden, inner),
        }


EXPERT_LINEARS = ("gate_proj", "up_proj", "down_proj")
"""The linears of an expert, by the names that a checkpoint has for them."""

EXPERT_STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""transformers' parameter of a layer's experts -> the linears whose rows lie behind each other in
each expert."""


def _qwen_sparse_layer(config: Any, index: int) -> bool:
    """Returns whether a layer has experts, as transformers' Qwen3MoeDecoderLayer and vLLM
    decide."""
    chosen = index not in (config.mlp_only_layers or ()) and (index + 1) % config.decoder_sparse_step == 0
    return chosen and config.num_experts > 0


@dataclass(frozen=True)
class DeltaNets:
    """The gated delta nets that some layers have in the place of attention.

    Their large linears are packed: ``in_proj_qkv`` (the rows of q, k and v), ``in_proj_z`` (a gate)
    and ``out_proj``. The two that make a number for each head, the decay and the strength of a
    write, stay in 16 bits, and so do the convolution and the norm on the heads.

    Attributes:
        is_layer: takes the configuration and a layer's index, and returns whether the layer has a
            delta net; the other layers have attention.
        module: name in a layer.
        plain: the linears in 16 bits, by their names in the module.
        exact: parameters that keep the dtype of the checkpoint, by their names in the module.
    """

    is_layer: Callable[[Any, int], bool]
    module: str = "linear_attn"
    plain: tuple[str, ...] = ("in_proj_b", "in_proj_a")
    exact: tuple[str, ...] = ("A_log", "dt_bias")

    @property
    def plain_linears(self) -> tuple[str, ...]:
        """:attr:`plain`, by their names in a layer."""
        return tuple(f"{self.module}.{name}" for name in self.plain)

    def projection_shapes(self, config: Any) -> dict[str, tuple[int, int]]:
        """Returns projection -> (output, input features)."""
        hidden, keys, values = config.hidden_size, self._keys(config), self._values(config)
        rows = (keys, keys, values, values)
        shapes = {name: (n, hidden) for name, n in zip(_DELTA_IN, rows, strict=True)}
        return shapes | {_DELTA_NET[-1]: (hidden, values)}

    def plain_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Returns name in a layer -> shape of the tensors in 16 bits."""
        hidden, heads = config.hidden_size, config.linear_num_value_heads
        channels = 2 * self._keys(config) + self._values(config)
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (heads, hidden) for name in self.plain}
        shapes |= {name: (heads,) for name in self.exact}
        shapes |= {"conv1d.weight": (channels, 1, config.linear_conv_kernel_dim)}
        shapes |= {"norm.weight": (config.linear_value_head_dim,)}
        return {f"{self.module}.{name}": shape for name, shape in shapes.items()}

    @staticmethod
    def _keys(config: Any) -> int:
        return config.linear_num_key_heads * config.linear_key_head_dim

    @staticmethod
    def _values(config: Any) -> int:
        return config.linear_num_value_heads * config.linear_value_head_dim


def _qwen_delta_layer(config: Any, index: int) -> bool:
    """Returns whether a layer has a delta net, as transformers' Qwen3_5DecoderLayer and vLLM
    decide."""
    return config.layer_types[index] == "linear_attention"


def _hard_coded(key: str, value: Any) -> Fixed:
    return Fixed(key, value, "vLLM's model is built for this value alone")


@dataclass(frozen=True)
class Architecture:
    """A decoder-only model, dense or with a mixture of experts, by itself or behind a vision tower.

    Names of linears and norms are relative to a layer, ``{layer_prefix}{i}.``. A projection is one
    of q, k, v, o, gate, up and down; a linear is what the checkpoint holds, which is a projection
    or several of them fused.
    """

    name: str
    """The name in ``architectures`` of config.json."""

    decoder: str = "model."
    """Prefix of the names of the decoder's embeddings, layers and last norm in transformers'
    model."""

    vision: str = ""
    """Prefix of the names of the vision tower, which stays in 16 bits; empty without a tower."""

    older_names: Mapping[str, str] = field(default_factory=dict)
    """Prefix of names in published checkpoints -> prefix in transformers' model."""

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Linear of the checkpoint -> the projections whose rows it concatenates."""

    norms_in_front: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _IN_FRONT)
    """Norm -> the projections whose input is exactly this norm's output."""

    norms_behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Norm -> the projection whose output is exactly this norm's input."""

    norm_offset: float = 0.0
    """Number that a norm adds to its stored weight before it multiplies."""

    head_norms: tuple[str, ...] = ()
    """Norms of size ``head_dim``."""

    output_norms: Mapping[str, str] = field(default_factory=dict)
    """Norm -> the projection whose output is as wide as the norm."""

    biased: tuple[str, ...] = ()
    """Projections that always have a bias."""

    bias_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Boolean of the configuration -> the projections that have a bias if it is true."""

    experts: Experts | None = None
    """The mixture of experts in the place of the MLP, for the layers that have one."""

    delta_nets: DeltaNets | None = None
    """The gated delta nets in the place of attention, for the layers that have one."""

    gated_query: bool = False
    """Whether ``q_proj`` also has the rows of a gate, as many as it has for the heads."""

    fixed: tuple[Fixed, ...] = ()
    """Settings with a single supported value."""

    oldest_vllm: str = ""
    """The oldest version of vLLM that lists the model; empty where every version that this package
    accepts does."""

    no_vllm_lora: str = ""
    """Why vLLM's own LoRA path does not take the family's adapters; empty where it does."""

    no_punica: str = ""
    """Why vLLM's own LoRA path (``qerl.rollout.lora=punica``) does not serve NVFP4 layers, though
    it serves 16-bit layers; empty where it does."""

    keeps_positions: bool = False
    """Whether transformers' attention layer takes ``position_ids`` without passing them to the
    attention function. flash-attn's FlashAttention separates the sequences of a packed row by them.
    """

    shares_base: bool = False
    """Whether one copy of the base can serve actor and rollout (``qerl.base``). vLLM must have a
    model of its own for the family, whose layers are those of the checkpoint, fused as in
    :meth:`scale_groups`."""

    @property
    def layer_prefix(self) -> str:
        """Prefix of the names of the decoder layers, before their number."""
        return f"{self.decoder}layers."

    @property
    def embeddings(self) -> str:
        """Name of the weight of the embeddings."""
        return f"{self.decoder}embed_tokens.weight"

    @property
    def plain_modules(self) -> tuple[str, ...]:
        """Linears in 16 bits, as compressed-tensors' ``ignore`` names them.

        The expressions match the names in transformers' model, in vLLM's and in older checkpoints.
        """
        names = ["lm_head"]
        if self.vision:
            names.append(rf"re:(?:.*\.)?{self._tower}\..*")
        if (nets := self.delta_nets) is not None:
            names.append(rf"re:.*\.{nets.module}\.(?:{'|'.join(nets.plain)})$")
        return tuple(names)

    def keeps_dtype(self, name: str) -> bool:
        """Returns whether a tensor keeps the dtype of the source when a checkpoint is quantized.

        Args:
            name: full name of a tensor.
        """
        nets = self.delta_nets
        return nets is not None and name.endswith(tuple(f".{nets.module}.{exact}" for exact in nets.exact))

    def is_of_tower(self, name: str) -> bool:
        """Returns whether a module belongs to the vision tower, by its name in any program."""
        return bool(self.vision) and self._tower in name.split(".")

    @property
    def _tower(self) -> str:
        return self.vision.rstrip(".").rpartition(".")[2]

    def module_name(self, name: str) -> str:
        """Returns the name in transformers' model of a checkpoint's tensor or linear."""
        for older, now in self.older_names.items():
            if name.startswith(older):
                return now + name.removeprefix(older)
        return name

    @property
    def linears(self) -> tuple[str, ...]:
        """The packed linears of the layers without experts: those of attention, of a delta net
        where some layers have one, and of the MLP."""
        return self._linears_of((*_ATTENTION, *_DELTA_NET, *_MLP) if self.delta_nets else (*_ATTENTION, *_MLP))

    @property
    def shared_scale_groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears that vLLM fuses and the checkpoint does not; those of a group share a global
        scale."""
        groups = (self._linears_of(g) for g in (_QKV, *([_DELTA_IN] if self.delta_nets else []), _GATE_UP))
        return tuple(group for group in groups if len(group) > 1)

    @property
    def noise_targets(self) -> dict[str, tuple[str, ...]]:
        """Norm that receives noise -> the linears that its output feeds.

        In families whose norms feed no linear, it maps the norm to the linear that feeds it.
        """
        norms = self.norms_in_front or self.norms_behind
        return {norm: self._linears_of(projections) for norm, projections in norms.items()}

    @property
    def noise_targets_with_experts(self) -> dict[str, tuple[str, ...]]:
        """:attr:`noise_targets` of a layer with experts, with router and experts in the MLP's
        place."""
        mlp, experts = self._linears_of(_MLP), self.experts
        if experts is None:
            return self.noise_targets
        return {
            norm: (experts.router, experts.module) if set(linears) & set(mlp) else linears
            for norm, linears in self.noise_targets.items()
        }

    @property
    def noise_targets_with_delta_nets(self) -> dict[str, tuple[str, ...]]:
        """:attr:`noise_targets` of a layer with a delta net, with all linears that read its input
        in the place of q, k and v."""
        if (nets := self.delta_nets) is None:
            return self.noise_targets
        fed, qkv = (*self._linears_of(_DELTA_IN), *nets.plain_linears), self._linears_of(_QKV)
        return {norm: fed if linears == qkv else linears for norm, linears in self.noise_targets.items()}

    def noise_targets_of(self, config: Any, index: int) -> dict[str, tuple[str, ...]]:
        """Returns :attr:`noise_targets` of layer ``index``, which may have experts or a delta
        net."""
        targets = dict(self.noise_targets)
        if self.has_experts(config, index):
            targets = dict(self.noise_targets_with_experts)
        if self.has_delta_net(config, index):
            changed = self.noise_targets_with_delta_nets
            targets |= {norm: changed[norm] for norm in targets if changed[norm] != self.noise_targets[norm]}
        return targets

    def _linears_of(self, projections: tuple[str, ...]) -> tuple[str, ...]:
        holder = {projection: linear for linear, parts in self.fused.items() for projection in parts}
        return tuple(dict.fromkeys(holder.get(projection, projection) for projection in projections))

    def projections_of(self, linear: str) -> tuple[str, ...]:
        """Returns the projections whose rows a linear holds, in order."""
        return tuple(self.fused.get(linear, (linear,)))

    def has_experts(self, config: Any, index: int) -> bool:
        """Returns whether a layer has experts in the place of the MLP."""
        return self.experts is not None and self.experts.is_layer(config, index)

    def has_delta_net(self, config: Any, index: int) -> bool:
        """Returns whether a layer has a gated delta net in the place of attention."""
        return self.delta_nets is not None and self.delta_nets.is_layer(config.get_text_config(), index)

    def projection_shapes(self, config: Any) -> dict[str, tuple[int, int]]:
        """Returns projection of the layers without experts -> (output, input features).

        Args:
            config: transformers' configuration object, which supplies the defaults of absent keys.
        """
        config = config.get_text_config()
        hidden, inner = config.hidden_size, config.intermediate_size
        head_dim = _head_dim(config)
        q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        return {
            "self_attn.q_proj": (2 * q_size if self.gated_query else q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            **(self.delta_nets.projection_shapes(config) if self.delta_nets else {}),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def linear_shapes(self, config: Any, index: int) -> dict[str, tuple[int, int]]:
        """Returns packed linear of layer ``index`` -> (output, input features)."""
        config = config.get_text_config()
        projections = self.projection_shapes(config)
        shapes = {}
        for linear in self._linears_in(config, index):
            parts = [projections[projection] for projection in self.projections_of(linear)]
            shapes[linear] = sum(rows for rows, _ in parts), parts[0][1]
        if self.experts is None or not self.has_experts(config, index):
            return shapes
        attention = {linear: shapes[linear] for linear in self._linears_of(_ATTENTION)}
        hidden, inner = config.hidden_size, getattr(config, self.experts.inner)
        for gate, up, down in self.experts.linears(config):
            attention |= {gate: (inner, hidden), up: (inner, hidden), down: (hidden, inner)}
        return attention

    def _linears_in(self, config: Any, index: int) -> list[str]:
        """Returns those of :attr:`linears` that a layer has, as if it had no experts."""
        absent = _ATTENTION if self.has_delta_net(config, index) else _DELTA_NET
        return [linear for linear in self.linears if self.projections_of(linear)[0] not in absent]

    def tensor_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of every tensor of the 16-bit checkpoint.

        Args:
            config: transformers' configuration object, which supplies the defaults of absent keys.

        Returns:
            The entries of the model's ``state_dict()``, without ``lm_head.weight`` where embeddings
            are tied. Experts are separate linears, see :class:`Experts`.

        Raises:
            UnsupportedArchitecture: ``config`` describes a variant of the model that is not served.
        """
        whole, config = config, config.get_text_config()
        self._check(config)
        hidden = config.hidden_size
        shapes = self._vision_shapes(whole) | {self.embeddings: (config.vocab_size, hidden)}
        layers = {}  # has experts, has a delta net -> shapes of such a layer
        for i in range(config.num_hidden_layers):
            kind = self.has_experts(config, i), self.has_delta_net(config, i)
            if kind not in layers:
                layers[kind] = self._layer_shapes(config, i)
            shapes |= {f"{self.layer_prefix}{i}.{name}": shape for name, shape in layers[kind].items()}
        shapes[f"{self.decoder}norm.weight"] = (hidden,)
        if not whole.tie_word_embeddings:
            shapes["lm_head.weight"] = (config.vocab_size, hidden)
        return shapes

    def _vision_shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Returns name -> shape of the vision tower's tensors, as transformers builds it."""
        if not self.vision:
            return {}
        from accelerate import init_empty_weights

        config = copy.deepcopy(config)
        decoder = config.get_text_config()
        decoder.num_hidden_layers = 1
        if getattr(decoder, "layer_types", None):
            decoder.layer_types = decoder.layer_types[:1]
        with init_empty_weights(include_buffers=False):
            model = automatic_class(self).from_config(config)
        tower = model.get_submodule(self.vision.rstrip("."))
        return {f"{self.vision}{name}": tuple(tensor.shape) for name, tensor in tower.state_dict().items()}

    def _layer_shapes(self, config: Any, index: int) -> dict[str, tuple[int, ...]]:
        hidden, projections = config.hidden_size, self.projection_shapes(config)
        linears = self.linear_shapes(config, index)
        layer: dict[str, tuple[int, ...]] = {
            f"{norm}.weight": (hidden,) for norm in (*self.norms_in_front, *self.norms_behind)
        }
        if self.delta_nets is not None and self.has_delta_net(config, index):
            layer |= self.delta_nets.plain_shapes(config)
        else:
            layer |= {f"{norm}.weight": (_head_dim(config),) for norm in self.head_norms}
        layer |= {f"{norm}.weight": projections[of][:1] for norm, of in self.output_norms.items()}
        if self.experts is not None and self.has_experts(config, index):
            layer[f"{self.experts.router}.weight"] = (getattr(config, self.experts.count), hidden)
        layer |= {f"{linear}.weight": shape for linear, shape in linears.items()}
        biased = list(self.biased)
        for switch, parts in self.bias_switches.items():
            biased += parts if getattr(config, switch) else ()
        return layer | {f"{linear}.bias": linears[linear][:1] for linear in self._linears_of(tuple(biased))}

    def adaptable(self, linears: Iterable[str]) -> list[str]:
        """Returns the packed linears that can have a LoRA adapter.

        These are all linears; in a model with experts those of the attention and of the experts.
        There PEFT 0.21 takes gate_proj, up_proj and down_proj in ``target_modules`` for the
        experts' 3-D parameters, and leaves out the MLP of a layer without experts
        (peft/utils/transformers_weight_conversion.py, _convert_peft_config_moe).

        Args:
            linears: full names of the packed linears.
        """
        if self.experts is None:
            return list(linears)
        attention, experts = tuple(f".{linear}" for linear in self._linears_of(_ATTENTION)), f".{self.experts.module}."
        return [name for name in linears if name.endswith(attention) or experts in name]

    def plain_linears(self, config: Any) -> tuple[str, ...]:
        """Returns the full names of the linears of the decoder layers that stay in 16 bits."""
        nets, layers = self.delta_nets, range(config.get_text_config().num_hidden_layers)
        of_nets = [
            f"{self.layer_prefix}{i}.{name}"
            for i in layers
            if nets is not None and self.has_delta_net(config, i)
            for name in nets.plain_linears
        ]
        return (*self.routers(config), *of_nets)

    def routers(self, config: Any) -> tuple[str, ...]:
        """Returns the full names of the routers, linears in 16 bits."""
        if (experts := self.experts) is None:
            return ()
        layers = range(config.get_text_config().num_hidden_layers)
        return tuple(f"{self.layer_prefix}{i}.{experts.router}" for i in layers if self.has_experts(config, i))

    def _check(self, config: Any) -> None:
        for setting in self.fixed:
            found = getattr(config, setting.key, None)
            if (found or None) != (setting.value or None) and found not in setting.same:
                raise UnsupportedArchitecture(
                    f"{self.name} with {setting.key}={found} in config.json is not supported, "
                    f"because {setting.reason}: {setting.key}={setting.value}. {DOCUMENTATION} has "
                    "the table of models."
                )

    def scale_groups(self) -> tuple[tuple[str, ...], ...]:
        """Returns the packed linears of the layers without experts, grouped by common global scale.

        A linear that shares its scale with no other is a group of its own.
        """
        shared = {linear for group in self.shared_scale_groups for linear in group}
        return (*self.shared_scale_groups, *((linear,) for linear in self.linears if linear not in shared))

    def layer_groups(self, config: Any, index: int) -> tuple[tuple[str, ...], ...]:
        """Returns :meth:`scale_groups` of layer ``index``, which may have experts or a delta net.

        Gate and up of an expert share a global scale, because vLLM keeps one for each expert
        (compressed_tensors_moe_w4a4_nvfp4.py, w13_weight_global_scale).
        """
        present = self._linears_in(config, index)
        groups = tuple(group for group in self.scale_groups() if group[0] in present)
        if self.experts is None or not self.has_experts(config, index):
            return groups
        attention = self._linears_of(_ATTENTION)
        of_experts = [group for gate, up, down in self.experts.linears(config) for group in ((gate, up), (down,))]
        return (*(group for group in groups if group[0] in attention), *of_experts)

    def all_groups(self, config: Any) -> Iterator[tuple[str, ...]]:
        """Yields :meth:`layer_groups` of all layers, with full names."""
        for i in range(config.get_text_config().num_hidden_layers):
            for group in self.layer_groups(config, i):
                yield tuple(f"{self.layer_prefix}{i}.{linear}" for linear in group)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


_VISION: dict[str, Any] = {"decoder": "model.language_model.", "vision": "model.visual."}

_AS_VLLM_READS_IT = "vLLM goes by the setting, and transformers' model is built for this value alone"
_QWEN35: dict[str, Any] = {
    "fused": {"linear_attn.in_proj_qkv": _DELTA_QKV},
    "norm_offset": 1.0,
    "head_norms": _NORMED_HEADS,
    "bias_switches": {"attention_bias": _ATTENTION},
    "delta_nets": DeltaNets(_qwen_delta_layer),
    "gated_query": True,
    "fixed": (
        Fixed("output_gate_type", "silu", _AS_VLLM_READS_IT, same=("swish", None)),
        Fixed("attn_output_gate", True, _AS_VLLM_READS_IT, same=(None,)),
    ),
}

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
        Architecture(
            "Qwen3MoeForCausalLM",
            head_norms=_NORMED_HEADS,
            experts=Experts(_qwen_sparse_layer),
            no_punica="it does not serve experts in NVFP4",
            fixed=(_hard_coded("attention_bias", False),),
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
            "Exaone4ForCausalLM",
            norms_in_front={},
            norms_behind=_BEHIND_ALONE,
            head_norms=_NORMED_HEADS,
            fixed=tuple(
                Fixed(key, False, "transformers' model is built for this value alone")
                for key in ("attention_bias", "bias", "mlp_bias")
            ),
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
        Architecture(
            "Qwen3_5ForCausalLM",
            **_QWEN35,
            oldest_vllm="0.28",
            no_punica=_NO_PUNICA_WITH_DELTA_NETS,
        ),
        Architecture(
            "Qwen2_5_VLForConditionalGeneration",
            **_VISION,
            older_names={
                "visual.": "model.visual.",
                "model.embed_tokens.": "model.language_model.embed_tokens.",
                "model.layers.": "model.language_model.layers.",
                "model.norm.": "model.language_model.norm.",
            },
            biased=_QKV,
        ),
        Architecture(
            "Qwen3VLForConditionalGeneration",
            **_VISION,
            bias_switches={"attention_bias": _ATTENTION},
            head_norms=_NORMED_HEADS,
        ),
    )
}


_DELTA_NETS = (
    "of the models with gated delta nets, Qwen3_5ForCausalLM alone is packed here, and without "
    "flash-linear-attention transformers 5.9 lets the state of a delta net run from one sequence "
    "of a packed row into the next"
)
NOT_YET = dict.fromkeys(
    (
        "Qwen3_5ForConditionalGeneration",
        *("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    ),
    _DELTA_NETS,
)
"""Requested models without a row -> the reason."""


def supported_architectures() -> tuple[str, ...]:
    """Returns the names of the models in the table."""
    return tuple(_ARCHITECTURES)


def get_architecture(hf_config: Any) -> Architecture:
    """Returns the row of a model in the table.

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
    if reason := next((NOT_YET[name] for name in names if name in NOT_YET), ""):
        found += f", which is not supported: {reason}"
    raise UnsupportedArchitecture(
        f"architecture in config.json: {found}. Supported are {', '.join(_ARCHITECTURES)}. "
        f"{DOCUMENTATION} says why others are not, and how a model is added."
    )


def text_settings(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the decoder's settings in config.json.

    Models with a vision tower keep them in a section of their own, ``text_config``.

    Args:
        content: the content of config.json.
    """
    return {**content, **(content.get("text_config") or {})}


def automatic_class(architecture: Architecture) -> Any:
    """Returns transformers' ``AutoModel...`` class that builds the model with its output layer."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if architecture.vision else AutoModelForCausalLM


def logits_divisor(config: Any) -> float:
    """Returns the number by which a model divides its logits (Granite's ``logits_scaling``), or 1.

    Args:
        config: transformers' configuration object.
    """
    return float(getattr(config.get_text_config(), "logits_scaling", None) or 1.0)
