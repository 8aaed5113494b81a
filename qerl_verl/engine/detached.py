"""The actor's worker of verl's separate trainer, which puts a policy aside and brings it back."""

from __future__ import annotations

import torch
from verl.experimental.separation.engine_workers import DetachActorWorker

from qerl_verl.engine.finite import local
from qerl_verl.engine.offload import wait_for_offload


class AdapterDetachWorker(DetachActorWorker):
    """verl's, with copies of what trains alone.

    Between two weight syncs verl computes old log-probabilities under the policy of the last one,
    so it copies the whole model to the host and back at each update (trainer_separate_async.py,
    _compute_old_log_prob). The base is frozen; and verl's copy of a tensor that is on the host
    already is that tensor itself (fsdp_utils.py, fsdp2_sharded_save_to_cpu), without a GPU and with
    ``param_offload``.
    """

    def _get_strategy_handlers(self):
        return save_trained, restore_trained


def save_trained(module: torch.nn.Module) -> tuple[dict[str, torch.Tensor], None]:
    """Copies on the host of this rank's part of each parameter that trains, by name; verl wants
    a pair."""
    wait_for_offload()
    trained = {n: local(p).detach() for n, p in module.named_parameters() if p.requires_grad}
    return {n: p.to("cpu", copy=True) for n, p in trained.items()}, None


@torch.no_grad()
def restore_trained(module: torch.nn.Module, saved: dict[str, torch.Tensor], _: None) -> None:
    """Puts the copies back in place, wherever the parameters are now."""
    wait_for_offload()
    for name, parameter in module.named_parameters():
        if name in saved:
            local(parameter).copy_(saved[name])
