"""Makes documents of runs (:mod:`qerl_verl.job`) for processes that a test starts without a
driver."""

from __future__ import annotations

import uuid

from qerl_verl.config.settings import QeRLSettings, RolloutSettings
from qerl_verl.job import BaseSharing, Job, LoraSettings


def sharing_job(
    required: bool = True,
    kernel: str = "auto",
    rank: int = 8,
    dtype: str = "bfloat16",
    model: str = "",
    **settings,
) -> Job:
    """Returns a run whose actor and rollout use one copy of the base, with a key of its own.

    Args:
        required: whether ``qerl.base=shared`` is set.
        kernel: ``qerl.rollout.kernel``.
        rank: rank of the adapter in the layers.
        dtype: dtype of the rollout.
        model: the shared checkpoint.
        settings: other settings under ``qerl.*``.
    """
    settings |= {"base": "shared" if required else "auto", "rollout": RolloutSettings(kernel)}
    sharing = BaseSharing(uuid.uuid4().hex, model)
    return Job(QeRLSettings(**settings), LoraSettings(rank, 2 * rank), dtype, sharing)
