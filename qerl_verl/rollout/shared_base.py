"""Loads a vLLM model whose NVFP4 layers, embeddings and output layer use the actor's memory.

The loader is registered as the load format ``qerl_shared`` through vLLM's
``register_model_loader``. vLLM builds the model as usual. A layer that finds its weights in the
actor's memory uses them instead of allocating its own, so a second copy never exists. All other
tensors (norms, biases) are copied from there through the model's own ``load_weights``, and nothing
is read from disk. The mapped memory is outside vLLM's memory pools: it stays in place while the
engine sleeps, and ``gpu_memory_utilization`` does not count it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import Parameter
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import DefaultModelLoader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms import current_platform

from qerl_verl.config.base import LOAD_FORMAT
from qerl_verl.job import find_job
from qerl_verl.log_lines import say
from qerl_verl.rollout.lora import FUSED
from qerl_verl.sharing.channel import SharedBase
from qerl_verl.sharing.errors import SharingError
from qerl_verl.sharing.layout import Group, Plain


@dataclass
class _Loading:
    """The base of the model under construction, and the parts of it that have found their layer."""

    base: SharedBase
    taken: set[str] = field(default_factory=set)


_loading: _Loading | None = None
"""Set while :class:`SharedBaseLoader` builds a model in this process."""


@contextmanager
def _building(base: SharedBase) -> Iterator[_Loading]:
    global _loading
    _loading = _Loading(base)
    try:
        yield _loading
    finally:
        _loading = None


class SharedWeights(NamedTuple):
    """The weight of an NVFP4 layer in the actor's memory.

    Attributes:
        packed, scale: ``[N, K / 2]`` packed values and ``[N, K / 16]`` scales, uint8.
        global_scales: of each projection, float32.
        whole: see :class:`~qerl_verl.sharing.layout.Group`.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    global_scales: torch.Tensor
    whole: bool


def shared_weights(layer: str, widths: Sequence[int], backend: str) -> SharedWeights | None:
    """Returns the weight of an NVFP4 layer in the actor's memory.

    Args:
        layer: the layer's full name in vLLM.
        widths: output channels of each of its projections.
        backend: name of the backend that computes it.

    Returns:
        The weight; None where the engine has its own base.

    Raises:
        SharingError: the actor has no such layer, or has it in another kernel's layout.
    """
    if _loading is None:
        return None
    group = _find_group(_loading.base.layout.groups, layer)
    fits = list(group.rows) == list(widths) or (len(group.rows) == 1 and sum(widths) == group.rows[0])
    if not fits or group.backend != backend:
        raise SharingError(
            f"{layer} has projections of {list(widths)} rows for {backend} in the rollout, of "
            f"{list(group.rows)} rows for {group.backend} in the actor"
        )
    _loading.taken.update(group.parts)
    data = _loading.base.data
    scales = group.global_scales if len(group.rows) == len(widths) else group.global_scales * len(widths)
    global_scales = torch.tensor(scales, dtype=torch.float32, device=data.device)
    return SharedWeights(*group.views(data), global_scales, group.whole)


def shared_embedding(layer: VocabParallelEmbedding) -> UnquantizedEmbeddingMethod | None:
    """Returns the method of an embedding or output layer with its weight in the actor's memory.

    The result is None where the weight is not there. The layer is found by its class, because some
    of vLLM's models do not pass the layer its name; the supported architectures have one of each.
    """
    name = "lm_head.weight" if isinstance(layer, ParallelLMHead) else "model.embed_tokens.weight"
    if _loading is None:
        return None
    plain = _loading.base.layout.tensors.get(name)
    if plain is None or not plain.shared:
        return None
    return SharedEmbedding(name, plain, _loading)


class SharedEmbedding(UnquantizedEmbeddingMethod):
    """vLLM's method for 16-bit embeddings and output layers, on a weight that the actor owns.

    Args:
        name: name of the weight.
        plain: place of the weight.
        loading: the base that holds it.
    """

    def __init__(self, name: str, plain: Plain, loading: _Loading):
        self.name, self.plain, self.loading = name, plain, loading

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Uses the actor's memory where shape and dtype fit, otherwise a weight that is copied."""
        rows, plain = sum(output_partition_sizes), self.plain
        fits = plain.shape[0] <= rows <= plain.room and plain.shape[1] == input_size_per_partition
        if not fits or getattr(torch, plain.dtype) != params_dtype:
            arguments = (input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype)
            super().create_weights(layer, *arguments, **extra_weight_attrs)
            return
        self.loading.taken.add(self.name)
        weight = plain.view(self.loading.base.data, rows)
        layer.register_parameter("weight", Parameter(weight, requires_grad=False))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Keeps torch's linear on a CPU, where vLLM would copy the weight in oneDNN's order."""
        if current_platform.is_cpu() and self.name in self.loading.taken:
            layer.cpu_linear = nn.functional.linear
        else:
            super().process_weights_after_loading(layer)


class SharedBaseLoader(BaseModelLoader):
    """vLLM's ``load_format=qerl_shared``.

    Where the actor shares nothing or its memory cannot be mapped, the engine reads a base of its
    own from the checkpoint and says so. With ``qerl.base=shared`` it ends instead.
    """

    def __init__(self, load_config):
        super().__init__(load_config)
        plain = copy.copy(load_config)
        plain.load_format = "safetensors"
        self._plain = DefaultModelLoader(plain)

    def download_model(self, model_config: ModelConfig) -> None:
        """Does nothing: the checkpoint is already on this host."""
        self._plain.download_model(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Copies a layer's own tensors from the actor's memory, or reads the checkpoint without
        it."""
        if _loading is None:
            self._plain.load_weights(model, model_config)
        else:
            model.load_weights(self._own_tensors(_loading))

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Returns the model on the actor's base.

        Raises:
            SharingError: with ``qerl.base=shared``, why the base cannot be shared.
        """
        job = find_job()
        sharing = None if job is None else job.sharing
        # another model_config is that of a draft model, for example
        if job is None or sharing is None or model_config is not vllm_config.model_config:
            return self._plain.load_model(vllm_config, model_config, prefix)
        try:
            base = SharedBase.connect(sharing.key, owner_rank(), torch.device(vllm_config.device_config.device))
        except SharingError as error:
            if job.settings.base == "shared":
                raise SharingError(f"qerl.base=shared: {error}; use qerl.base=separate") from error
            say(f"base: the rollout loads a second copy: {error}")
            return self._plain.load_model(vllm_config, model_config, prefix)
        with _building(base) as loading:
            model = super().load_model(vllm_config, model_config, prefix)
        self._check(loading)
        base.watch()
        model.qerl_shared_base = base  # the mapping lasts as long as the model
        beside = "" if base.data.device.type == "cpu" else ", which gpu_memory_utilization does not count"
        size = f"{base.layout.shared_bytes() / 2**30:.2f} GiB"
        say(f"base: the rollout uses {size} of the actor's{beside}")
        return model

    @staticmethod
    def _own_tensors(loading: _Loading) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the names and tensors that no layer uses in place."""
        base = loading.base
        for name, plain in base.layout.tensors.items():
            if name not in loading.taken:
                yield name, plain.view(base.data)

    @staticmethod
    def _check(loading: _Loading) -> None:
        missed = [part for group in loading.base.layout.groups for part in group.parts if part not in loading.taken]
        if missed:
            raise SharingError(
                f"{len(missed)} NVFP4 layers of the actor have no place in the rollout's model, "
                f"{missed[0]} is one; use qerl.base=separate"
            )


def owner_rank() -> int:
    """Returns the actor's rank on this engine's device.

    Replicas of one process each are numbered like the ranks.
    """
    return int(os.environ.get("VERL_REPLICA_RANK", "0"))


def _find_group(groups: Sequence[Group], layer: str) -> Group:
    for group in groups:
        first, name = group.parts[0], group.parts[0]
        if len(group.parts) > 1:
            heads = {
                plain: fused for plain, (fused, places) in FUSED.items() if places[0] == 0 and first.endswith(plain)
            }
            name = next((first.removesuffix(plain) + fused for plain, fused in heads.items()), "")
        if name == layer:
            return group
    raise SharingError(f"the actor's base has no layer {layer}")


def register_shared_base() -> None:
    """Adds the load format ``qerl_shared`` in this process."""
    register_model_loader(LOAD_FORMAT)(SharedBaseLoader)
