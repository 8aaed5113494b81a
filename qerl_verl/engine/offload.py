"""Waits for verl's asynchronous copies to the host."""

from __future__ import annotations

import torch


def wait_for_offload() -> None:
    """Waits for the copies that verl has queued. Call it before the host reads or writes what verl
    may have offloaded.

    With ``param_offload`` and ``optimizer_offload`` verl copies to pinned memory with
    ``non_blocking=True`` and leaves the waiting to whoever reads there (verl/utils/fsdp_utils.py,
    offload_fsdp2_model_to_cpu and offload_fsdp_optimizer).
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
