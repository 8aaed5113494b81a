"""Reads the inputs of :mod:`qerl_verl.memory.estimate` from a model's and a run's configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config.checks.models import local_folder
from qerl_verl.config.keys import get_value
from qerl_verl.config.rules import ACTOR, MODEL, ROLLOUT
from qerl_verl.lora.experts import is_of_experts
from qerl_verl.lora.targets import matched_layers
from qerl_verl.memory.estimate import ACTIVATION, Model, Run
from qerl_verl.nvfp4.architectures import get_architecture


def read_config(config: DictConfig) -> dict[str, Any]:
    """Returns the content of the actor's ``config.json``.

    For a name on the hub, only that file is downloaded.

    Raises:
        OSError: there is no such file.
    """
    folder = local_folder(config, MODEL)
    if folder is not None:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(get_value(config, f"{MODEL}.path")).to_dict()


def model_of(content: Mapping[str, Any], rank: int, targets: Any, exclude: Any = None) -> Model:
    """Returns the shapes of a model with an adapter.

    Args:
        content: the content of ``config.json``.
        rank: rank of the adapter.
        targets, exclude: ``target_modules`` and ``exclude_modules`` of verl's model configuration.

    Raises:
        UnsupportedArchitecture: the model is not supported.
    """
    from transformers import AutoConfig

    architecture = get_architecture(content)
    values = {key: value for key, value in content.items() if key not in ("model_type", "quantization_config")}
    config = AutoConfig.for_model(content["model_type"], **values)
    shapes, projections = architecture.tensor_shapes(config), architecture.projection_shapes(config)
    packed = {linear: shapes[f"{linear}.weight"] for group in architecture.all_groups(config) for linear in group}
    adapted = matched_layers(architecture.adaptable(packed), targets, exclude)
    config = config.get_text_config()
    of_layers = [architecture.has_experts(config, i) for i in range(config.num_hidden_layers)]
    experts, chosen, inner, decoded = architecture.experts, 0, 0, 0
    if experts is not None and any(of_layers):
        chosen = getattr(config, experts.chosen)
        inner = chosen * getattr(config, experts.inner)
        decoded = ACTIVATION * max(math.prod(shape) for shape in experts.stacked_shapes(config).values())
    if not all(of_layers):
        inner = max(inner, config.intermediate_size)
    return Model(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=inner,
        vocabulary=config.vocab_size,
        query=projections["self_attn.q_proj"][0],
        key=projections["self_attn.k_proj"][0],
        packed=sum(math.prod(shape) for shape in packed.values()) * 9 // 16,
        plain=sum(math.prod(s) for n, s in shapes.items() if n.removesuffix(".weight") not in packed) * ACTIVATION,
        adapter=sum(rank * sum(packed[name]) for name in adapted),
        of_experts=sum(rank * sum(packed[name]) for name in adapted if is_of_experts(name)),
        chosen=chosen,
        decoded=decoded,
    )


def run_of(config: DictConfig, shared: bool) -> Run:
    """Returns the settings that decide about memory.

    Args:
        config: a composed configuration, after the rules of the switch.
        shared: whether actor and rollout use one copy of the base.
    """
    get = partial(get_value, config)
    sequence = get("data.max_prompt_length") + get("data.max_response_length")
    if get(f"{ACTOR}.use_dynamic_bsz"):
        tokens = get(f"{ACTOR}.ppo_max_token_len_per_gpu")
    else:
        size = get(f"{ACTOR}.ppo_micro_batch_size_per_gpu") or 1
        tokens = size * sequence
    ranks = (get("trainer.nnodes") or 1) * get("trainer.n_gpus_per_node")
    parallel = get(f"{ROLLOUT}.tensor_model_parallel_size") or 1
    rollouts = get("data.train_batch_size") * get(f"{ROLLOUT}.n")
    return Run(
        ranks=ranks,
        parallel=parallel,
        shared=shared,
        recompute=get("qerl.recompute") or "auto",
        tokens=tokens,
        sequence=sequence,
        sequences=min(get(f"{ROLLOUT}.max_num_seqs"), -(-rollouts * parallel // ranks)),
        fused_logits=bool(get(f"{MODEL}.use_fused_kernels")),
        utilization=get(f"{ROLLOUT}.gpu_memory_utilization"),
        param_offload=bool(get(f"{ACTOR}.fsdp_config.param_offload")),
        optimizer_offload=bool(get(f"{ACTOR}.fsdp_config.optimizer_offload")),
        sleeps=bool(get(f"{ROLLOUT}.free_cache_engine")),
        sleep_level=OmegaConf.select(config, "qerl.rollout.sleep_level") or 1,
    )
