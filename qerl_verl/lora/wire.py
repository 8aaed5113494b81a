"""Packs an adapter's configuration as one more tensor among the adapter's tensors.

verl's checkpoint engines transfer names and tensors only, and verl drops the configuration before
them (verl/workers/engine_workers.py, update_weights). With this tensor, the receiver recognises an
adapter.
"""

from __future__ import annotations

import json
from typing import Any

import torch

CONFIG_TENSOR = "qerl_adapter_config"
"""Name of the tensor."""


def pack_config(config: dict[str, Any]) -> torch.Tensor:
    """Returns a PEFT configuration as ASCII JSON in a tensor, ``[bytes]`` uint8 on the CPU.

    Sets become sorted lists, so the tensor is the same on every rank.
    """
    text = json.dumps(config, default=sorted)
    return torch.tensor(list(text.encode("ascii")), dtype=torch.uint8)


def take_config(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Removes the configuration from received tensors and returns it; the rest is the adapter.

    Some checkpoint engines cast all tensors to bfloat16, which holds every ASCII code.

    Raises:
        ValueError: there is no configuration, so the tensors are not an adapter.
    """
    packed = tensors.pop(CONFIG_TENSOR, None)
    if packed is None:
        raise ValueError(
            f"a weight sync brought {len(tensors)} tensors without an adapter's configuration; the "
            "rollout's base is packed in NVFP4 and takes adapters alone"
        )
    return json.loads(bytes(packed.to("cpu", torch.uint8).tolist()))
