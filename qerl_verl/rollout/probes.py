"""Looks into a rollout worker, for tests and benchmarks; a run does not call these functions.

Each function takes the worker, so that ``LLM.collective_rpc(function)`` runs it in every worker.
vLLM passes functions to its workers only with ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch


def adapter_digest(worker: Any) -> str:
    """Returns the SHA-256 of the adapter in the worker's layers."""
    buffers = worker.model_runner.get_model().named_buffers()
    return _digest((name, tensor) for name, tensor in buffers if "qerl_lora_" in name)


def base_digest(worker: Any) -> str:
    """Returns the SHA-256 of the names and bytes of the base's tensors, which exclude noise."""
    parameters = worker.model_runner.get_model().named_parameters()
    return _digest((name, tensor) for name, tensor in parameters if "lora_" not in name)


def norm_weights(worker: Any) -> dict[str, list[float]]:
    """Returns full module name in transformers' model -> float32 weight of norms that take
    noise."""
    return {name: norm.live.cpu().tolist() for name, norm in worker._qerl_noise_injector().targets.items()}


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
