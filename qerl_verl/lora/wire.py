"""An adapter's configuration as one more tensor among the adapter's own.

verl's checkpoint engines carry names and tensors and nothing else, and verl drops the configuration
before them (verl/workers/engine_workers.py, update_weights). With this tensor what arrives says by
itself that it is an adapter.
"""

from __future__ import annotations

import json
from typing import Any

import torch

CONFIG_TENSOR = "qerl_adapter_config"
"""The tensor's name."""


def pack_config(config: dict[str, Any]) -> torch.Tensor:
    """Returns a PEFT configuration as JSON: ``[bytes]`` uint8, ASCII, on the CPU; sets become
    lists. The same on every rank."""
    text = json.dumps(config, default=sorted)
    return torch.tensor(list(text.encode("ascii")), dtype=torch.uint8)


def take_config(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Takes the configuration out of what a checkpoint engine delivered. What stays in ``tensors``
    is the adapter.

    Some engines cast all that they send to bfloat16, which holds every ASCII code.

    Raises:
        ValueError: it has none, so it is no adapter.
    """
    packed = tensors.pop(CONFIG_TENSOR, None)
    if packed is None:
        raise ValueError(
            f"a weight sync brought {len(tensors)} tensors without an adapter's configuration; the rollout's base is packed in "
            "NVFP4 and takes adapters alone"
        )
    return json.loads(bytes(packed.to("cpu", torch.uint8).tolist()))
