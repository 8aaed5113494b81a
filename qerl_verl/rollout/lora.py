"""Keeps the adapter inside the NVFP4 linears of vLLM, in static buffers that a weight sync
overwrites.

One policy has one adapter. vLLM's own LoRA path (punica) serves many at once, at a cost in every
decoding step. Here the adapter is part of the layer, captured by CUDA graphs, and needs no LoRA
request. Tensor parallelism divides it like the weight: B by rows in column-parallel layers, A by
columns in row-parallel layers, whose partial results vLLM sums anyway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from qerl_verl.job import LoraSettings, RolloutLayers
from qerl_verl.lora.experts import parse_stacked, stack_experts
from qerl_verl.rollout.expert_lora import cut_expert_adapter, write_expert_adapter
from qerl_verl.rollout.linear_lora import adapter_of

Places = tuple[int, ...]
"""The projections of a fused layer that a tensor of an adapter belongs to, in the order of their
rows; empty for all."""

FUSED: dict[str, tuple[str, Places]] = {
    "self_attn.q_proj": ("self_attn.qkv_proj", (0,)),
    "self_attn.k_proj": ("self_attn.qkv_proj", (1,)),
    "self_attn.v_proj": ("self_attn.qkv_proj", (2,)),
    "mlp.gate_proj": ("mlp.gate_up_proj", (0,)),
    "mlp.up_proj": ("mlp.gate_up_proj", (1,)),
    "linear_attn.in_proj_qkv": ("linear_attn.in_proj_qkvz", (0, 1, 2)),
    "linear_attn.in_proj_z": ("linear_attn.in_proj_qkvz", (3,)),
    "linear_attn.in_proj_b": ("linear_attn.in_proj_ba", (0,)),
    "linear_attn.in_proj_a": ("linear_attn.in_proj_ba", (1,)),
}
"""Linear of a checkpoint -> its place in vLLM's models (packed_modules_mapping of
vllm/model_executor/models/qwen2.py and qwen3_5.py).
"""

_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight$")

_EXPERT = re.compile(r"\.mlp\.experts\.")
_ROUTER = re.compile(r"\.mlp\.gate\.")


def lora_settings(additional_config) -> LoraSettings | None:
    """Returns the adapter in vLLM's ``additional_config``, or None.

    It is None where vLLM's own path serves the adapter, or there is none.
    """
    layers = RolloutLayers.of_engine(additional_config)
    return layers.lora if layers else None


def shard(tensor: torch.Tensor, dim: int, size: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Returns this rank's part of a full tensor, with ``size`` entries along ``dim``.

    A dimension that is not divided stays whole. One that is divided into fewer parts than ranks
    (the few key and value heads of grouped-query attention) is repeated, and neighbours share a
    part (vllm/model_executor/layers/linear.py, QKVParallelLinear).
    """
    parts = tensor.shape[dim] // size
    if parts * size != tensor.shape[dim] or (parts > 1 and tp_size % parts):
        raise ValueError(
            f"{tuple(tensor.shape)} cannot be divided into parts of {size} along {dim} for {tp_size} ranks"
        )
    if parts == 1:
        return tensor
    return tensor.narrow(dim, tp_rank // (tp_size // parts) * size, size)


def projection_rows(layer: torch.nn.Module) -> list[int]:
    """Returns the rows of each projection of a layer over all tensor-parallel ranks.

    Key and value heads that vLLM repeats on several ranks count once
    (vllm/model_executor/layers/linear.py, QKVParallelLinear).
    """
    sizes = list(getattr(layer, "output_sizes", None) or layer.logical_widths)
    replicas = getattr(layer, "num_kv_head_replicas", 1)
    return [size // replicas if index else size for index, size in enumerate(sizes)]


def split_fused(parts: dict[tuple[Places, str], torch.Tensor], rows: list[int]) -> dict[tuple[int, str], torch.Tensor]:
    """Splits the adapter of a linear that the checkpoint holds fused into one for each projection.

    The projections share A; B is divided by rows.

    Args:
        parts: places and ``"A"`` -> ``[rank, K]``, places and ``"B"`` -> ``[N, rank]``.
        rows: rows of each projection of the layer.

    Raises:
        ValueError: B of several projections has another number of rows.
    """
    split = {}
    for (places, part), tensor in parts.items():
        places = places or tuple(range(len(rows)))
        if part == "A" or len(places) == 1:
            split |= {(place, part): tensor for place in places}
            continue
        sizes = [rows[place] for place in places]
        if len(tensor) != sum(sizes):
            raise ValueError(f"B has {len(tensor)} rows, the rollout model's projections have {sizes}")
        split |= {(place, part): piece for place, piece in zip(places, tensor.split(sizes), strict=True)}
    return split


class AdapterStore:
    """Writes adapters into the layers of one worker's model.

    Args:
        model: vLLM's model on this rank.
        tp_rank, tp_size: this rank, and the number of tensor-parallel ranks.
        renamed: prefix of the decoder's names in transformers' model, and in vLLM's.
    """

    def __init__(self, model: torch.nn.Module, tp_rank: int, tp_size: int, renamed: tuple[str, str] = ("", "")):
        self.renamed = renamed
        self.layers = {n: m for n, m in model.named_modules() if adapter_of(m) is not None}
        self.experts = {m.qerl_lora_experts: m for m in model.modules() if hasattr(m, "qerl_lora_experts")}
        self.tp_rank, self.tp_size = tp_rank, tp_size

    def locate(self, name: str) -> tuple[str, Places, str]:
        """Finds the place of an adapter's tensor: layer in vLLM, projections, and ``A`` or ``B``.

        Raises:
            ValueError: no layer of the model takes the tensor.
        """
        match = _NAME.match(name)
        if match:
            for candidate in self._candidates(match["module"]):
                if candidate in self.layers:
                    return candidate, (), match["part"]
                for plain, (fused, places) in FUSED.items():
                    if candidate.endswith(plain) and candidate.removesuffix(plain) + fused in self.layers:
                        return candidate.removesuffix(plain) + fused, places, match["part"]
        if _ROUTER.search(name):
            raise ValueError(
                f"the adapter has a tensor {name}: the rollout serves no adapter on the router of "
                "a mixture; take it out of actor_rollout_ref.model.target_modules"
            )
        if _EXPERT.search(name):
            raise ValueError(
                f"the adapter has a tensor {name}: the rollout takes an adapter on experts by the "
                "names of their linears, not by those of 3-D parameters (PEFT's "
                "target_parameters); train one with gate_proj, up_proj and down_proj in "
                "actor_rollout_ref.model.target_modules"
            )
        raise ValueError(
            f"the adapter has a tensor {name}, for which the rollout model has no NVFP4 layer: "
            "take its module out of actor_rollout_ref.model.target_modules, or set "
            "qerl.rollout.lora=punica"
        )

    def _candidates(self, module: str) -> tuple[str, ...]:
        """Returns the names that a module of transformers may have in vLLM's model."""
        module, (theirs, ours) = module.removeprefix("base_model.model."), self.renamed
        if theirs != ours and module.startswith(theirs):
            module = ours + module.removeprefix(theirs)
        return module, module.removeprefix("model."), f"model.{module}"

    def _locate_experts(self, name: str, module: str) -> str:
        for candidate in self._candidates(module):
            if candidate in self.experts:
                return candidate
        raise ValueError(
            f"the adapter has a tensor {name}, for which the rollout's experts have no room: the "
            "engine was started for an adapter without experts; name gate_proj, up_proj and "
            "down_proj in actor_rollout_ref.model.target_modules"
        )

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], scaling: float) -> int:
        """Overwrites the buffers of every layer; parts that the adapter does not have become zero.

        Args:
            tensors: full tensors, with PEFT's names; those of experts one by one or stacked
                (:mod:`qerl_verl.lora.experts`).
            scaling: the adapter's own lora_alpha / rank (or over its root, for rsLoRA).

        Returns:
            The number of tensors.

        Raises:
            ValueError: a tensor has no place or a shape that does not fit, its rank exceeds that of
                the buffers, or an A has no B. Nothing has been written in that case.
        """
        found: dict[str, dict[tuple[Places, str], torch.Tensor]] = {}
        of_experts: dict[str, dict[tuple[str, str], torch.Tensor]] = {}
        given = dict(tensors)
        for name, tensor in stack_experts(given).items():
            if parsed := parse_stacked(name):
                module, part, stack = parsed
                of_experts.setdefault(self._locate_experts(name, module), {})[stack, part] = tensor
            else:
                layer, places, part = self.locate(name)
                found.setdefault(layer, {})[places, part] = tensor
        for name, parts in of_experts.items():
            self._cut(name, parts, scaling)
        pieces: dict[str, dict[tuple[int, str], torch.Tensor]] = {}
        for name in found:
            try:
                pieces[name] = split_fused(found[name], projection_rows(self.layers[name]))
            except ValueError as error:
                raise ValueError(f"the adapter's {name} does not fit the rollout model: {error}") from error
            self.layers[name].qerl_adapter.check(self.layers[name], name, pieces[name], self._shard)
        for name, layer in self.layers.items():
            layer.qerl_adapter.write(layer, pieces.get(name, {}), scaling, self._shard)
        for name, layer in self.experts.items():
            write_expert_adapter(layer, self._cut(name, of_experts.get(name, {}), scaling))
        return len(given)

    def _cut(self, name: str, parts: dict[tuple[str, str], torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
        try:
            return cut_expert_adapter(self.experts[name], parts, scaling, self._shard)
        except ValueError as error:
            raise ValueError(f"the adapter of {name} does not fit the rollout model: {error}") from error

    def _shard(self, tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        return shard(tensor, dim, size, self.tp_rank, self.tp_size)


def adapter_scaling(peft_config) -> float:
    """Returns lora_alpha / rank of a PEFT configuration (object or mapping), or lora_alpha /
    sqrt(rank) for rsLoRA.

    Raises:
        ValueError: ranks or alphas differ from layer to layer.
    """
    get = (
        peft_config.get if hasattr(peft_config, "get") else lambda key, default=None: getattr(peft_config, key, default)
    )
    for pattern in ("rank_pattern", "alpha_pattern"):
        if get(pattern):
            raise ValueError(f"{pattern} of the adapter is not supported with qerl.rollout.lora=inline; use punica")
    rank = get("r")
    return get("lora_alpha") / (rank**0.5 if get("use_rslora") else rank)
