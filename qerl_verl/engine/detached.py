"""Provides the actor's worker of verl's separate trainer, which saves a policy and restores it
later."""

from __future__ import annotations

import torch
from verl.experimental.separation.engine_workers import DetachActorWorker

from qerl_verl.engine.offload import wait_for_offload
from qerl_verl.finite import local


class AdapterDetachWorker(DetachActorWorker):
    """Saves and restores only the trained parameters.

    Between two weight syncs verl computes old log-probabilities under the policy of the last sync,
    so it copies the whole model to the host and back at each update (trainer_separate_async.py,
    _compute_old_log_prob). The base is frozen and needs no copy. Moreover, verl's copy of a tensor
    on the host is that tensor itself (fsdp_utils.py, fsdp2_sharded_save_to_cpu), which matters
    without a GPU and with ``param_offload``.
    """

    def _get_strategy_handlers(self):
        return save_trained, restore_trained


def save_trained(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], None]:
    """Returns copies on the host of this rank's shards of all trained parameters, by name, as the
    first item of the pair that verl expects.
    """
    wait_for_offload()
    trained = {n: local(p).detach() for n, p in module.named_parameters() if p.requires_grad}
    return {n: p.to("cpu", copy=True) for n, p in trained.items()}, None


@torch.no_grad()
def restore_trained(module: torch.nn.Module, saved: dict[str, torch.Tensor], _: None) -> None:
    """Copies the saved shards into the parameters, on whichever device these are."""
    wait_for_offload()
    for name, parameter in module.named_parameters():
        if name in saved:
            local(parameter).copy_(saved[name])
