"""Checks of explicitly chosen kernels (``qerl.kernel``, ``qerl.rollout.kernel``) against the layers
of local models.

The layers are checked again when they are built, for models on the hub and for the device's own
restrictions. This check gives the answer before Ray starts.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from qerl_verl.config.keys import get_value
from qerl_verl.config.rules import ACTOR, MODEL, ROLLOUT

if TYPE_CHECKING:
    import torch

    from qerl_verl.nvfp4.architectures import Architecture

_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj")
"""Their input channels are divided among tensor-parallel ranks, the others' output channels."""


def find_problems(config: DictConfig, folder: Path) -> list[str]:
    """Returns the layers of the actor's model that an explicitly chosen kernel does not support,
    one sentence for each setting.

    Args:
        config: the configuration after the rules (:mod:`qerl_verl.config.rules`).
        folder: the model, quantized or not.

    Raises:
        CheckpointError: the model cannot be read.
    """
    from transformers import AutoConfig

    from qerl_verl.config.publish import adapter_targets
    from qerl_verl.lora.experts import adapts_experts
    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.checkpoint_files import read_config

    actor, rollout = get_value(config, "qerl.kernel"), get_value(config, "qerl.rollout.kernel")
    architecture = get_architecture(read_config(folder))
    inline = get_value(config, "qerl.rollout.lora") == "inline"
    if architecture.experts and inline and rollout == "marlin" and adapts_experts(adapter_targets(config)):
        return [
            "qerl.rollout.kernel=marlin takes no adapter on the experts, which "
            f"{MODEL}.target_modules names; use auto or triton"
        ]
    if all(kernel in (None, "auto", "pytorch", "marlin") for kernel in (actor, rollout)):
        return []
    hf_config = AutoConfig.from_pretrained(folder)
    alone, dense, decoder = {}, False, hf_config.get_text_config()
    # layers with experts are like each other, and so are the others
    for i in range(decoder.num_hidden_layers):
        alone |= {linear: (shape, ()) for linear, shape in architecture.linear_shapes(hf_config, i).items()}
        dense = dense or not architecture.has_experts(hf_config, i)
    divided = get_value(config, f"{ROLLOUT}.tensor_model_parallel_size") or 1
    fused = {}
    for group in architecture.scale_groups():
        if not dense and group[0] not in alone:
            continue
        projections = [projection for linear in group for projection in architecture.projections_of(linear)]
        parts = {projection: architecture.projection_shapes(hf_config)[projection] for projection in projections}
        fused[", ".join(group)] = _fused(parts, divided, decoder.num_key_value_heads)
    rank = get_value(config, f"{MODEL}.lora_rank") if inline else None
    found = (
        _first_refusal("qerl.kernel", actor, alone, _actor_dtype(config), None),
        _first_refusal("qerl.rollout.kernel", rollout, fused, get_value(config, f"{ROLLOUT}.dtype"), rank)
        or _experts_refusal(rollout, architecture, hf_config, divided, get_value(config, f"{ROLLOUT}.dtype")),
    )
    return [problem for problem in found if problem]


def _fused(group: dict[str, tuple[int, int]], divided: int, key_value_heads: int) -> tuple[tuple[int, int], tuple]:
    """Returns the projections that vLLM fuses into one layer: the layer's shape on one
    tensor-parallel rank, and the row at which each projection ends.
    """
    rows, columns = [], 0
    for linear, (n, k) in group.items():
        by_columns = linear.endswith(_ROW_PARALLEL)
        among = 1 if by_columns else divided
        if linear.endswith(("k_proj", "v_proj")):
            # where there are fewer heads than ranks, they are repeated
            among = min(among, key_value_heads)
        rows.append(n // among)
        columns = k // (divided if by_columns else 1)
    return (sum(rows), columns), tuple(accumulate(rows))


def _actor_dtype(config: DictConfig) -> str:
    return get_value(config, f"{ACTOR}.fsdp_config.mixed_precision.param_dtype") or "bf16"


def _experts_refusal(
    kernel: str | None, architecture: Architecture, hf_config: Any, divided: int, dtype: str | None
) -> str | None:
    """Returns the same for the experts in the rollout, which have other kernels than the
    linears."""
    from qerl_verl.nvfp4.candidates import expert_candidates

    experts = architecture.experts
    if experts is None or not any(architecture.has_experts(hf_config, i) for i in range(hf_config.num_hidden_layers)):
        return None
    n, k = 2 * getattr(hf_config, experts.inner) // divided, hf_config.hidden_size
    for candidate in expert_candidates(captured=False):  # the device is not known here
        if candidate.name == kernel and (reason := candidate.unsupported_weight(n, k, _torch_dtype(dtype))):
            return f"qerl.rollout.kernel={kernel} does not serve {experts.module} of {n} x {k}: {reason}; use auto"
    return None


def _torch_dtype(name: str | None) -> torch.dtype:
    """Returns the dtype for a name that verl and vLLM accept; bfloat16 if there is none."""
    import torch

    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    found = getattr(torch, short.get(str(name), str(name)), None)
    return found if isinstance(found, torch.dtype) else torch.bfloat16


def _first_refusal(key: str, kernel: str | None, layers: dict, dtype: str | None, rank: int | None) -> str | None:
    from qerl_verl.kernels.backends import BACKENDS, get_backend

    if kernel not in [backend.name for backend in BACKENDS]:
        return None
    chosen = _torch_dtype(dtype)
    backend = get_backend(kernel)
    for name, ((n, k), ends) in layers.items():
        if reason := backend.unsupported_weight(n, k, chosen):
            return f"{key}={kernel} does not serve {name} of {n} x {k}: {reason}; use auto"
        if rank and ends and backend.takes_adapter:
            if reason := backend.unsupported_adapter(n, k, backend.padded_rank(rank), ends):
                return f"{key}={kernel} does not take the adapter of {name} of {n} x {k}: {reason}; use auto"
    return None
