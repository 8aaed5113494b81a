"""Counts the resources that a run takes from Ray."""

from __future__ import annotations

from dataclasses import dataclass

from qerl_verl.config.keys import Get


@dataclass(frozen=True)
class Reserved:
    """The resources that the processes of a run hold.

    Attributes:
        gpus: GPUs, or slots on the CPU platform.
        cpus: logical CPUs.
        parts: which processes hold the CPUs, in words.
    """

    gpus: int
    cpus: int
    parts: str


def reserved(get: Get) -> Reserved:
    """Counts the resources that verl reserves (verl/single_controller/ray/base.py: 3 CPUs for each
    GPU of a resource pool, 2 for one of rollout engines of their own; transfer_queue: 1 for its
    controller and 1 for each storage unit).
    """
    training = get("trainer.n_gpus_per_node") * get("trainer.nnodes")
    if get("reward.reward_model.enable_resource_pool"):
        training += get("reward.reward_model.n_gpus_per_node") * get("reward.reward_model.nnodes")
    own = (
        get("actor_rollout_ref.rollout.n_gpus_per_node") * get("actor_rollout_ref.rollout.nnodes")
        if is_separate(get)
        else 0
    )
    storage = 1
    if (get("transfer_queue.backend.storage_backend") or "SimpleStorage") == "SimpleStorage":
        storage += get("transfer_queue.backend.SimpleStorage.num_data_storage_units") or 1
    parts = [f"3 for each of {training} GPUs", f"{storage} for TransferQueue", "1 to start others with"]
    if own:
        parts.insert(1, f"2 for each of {own} GPUs of the rollout")
    return Reserved(training + own, 3 * training + 2 * own + storage + 1, ", ".join(parts))


def is_separate(get: Get) -> bool:
    """Returns whether separate engines sample, in a trainer name of verl's or of QeRL's."""
    return "separate_async" in str(get("trainer.v1.trainer_mode"))
