"""Checks of the checkpoint that a run resumes from, if this machine can read it. The trainer checks
again on its own node.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config.keys import get_value
from qerl_verl.config.policy import describe_policy


def find_problems(config: DictConfig, adapters: Mapping[str, dict] | None = None) -> list[str]:
    """Returns why a run cannot continue from its checkpoint, one sentence each.

    Args:
        config: the configuration after the rules (:mod:`qerl_verl.config.rules`).
        adapters: see :class:`~qerl_verl.config.plan.Plan`.
    """
    mode = get_value(config, "trainer.resume_mode")
    key = {"auto": "trainer.default_local_dir", "resume_path": "trainer.resume_from_path"}.get(mode)
    path = get_value(config, key) if key else None
    if not isinstance(path, str) or not Path(path).is_dir():
        return []
    from qerl_verl.nvfp4.errors import CheckpointError
    from qerl_verl.trainer.checkpoints import check_base, check_policy, find_resumable

    try:
        folder = find_resumable(path, lambda line: None) if mode == "auto" else Path(path)
        if folder is None:
            return []
        check_policy(folder, describe_policy(config, adapters))
        if base := get_value(config, "qerl.base_fingerprint"):
            check_base(folder, OmegaConf.to_container(base))
    except CheckpointError as error:
        return [f"{key}={path}: {error}"]
    return []
