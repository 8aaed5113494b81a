"""How the processes of a job tell that it runs with the switch."""

import os

SWITCH_ENV = "QERL_SWITCH"
"""Set in every process of such a job, through Ray's runtime environment; the value is the arm's
name."""

ENGINE_VENDOR = "qerl"
"""``VERL_ENGINE_VENDOR`` of such a job: what the engines are registered under in verl's
EngineRegistry."""

KERNEL_ENV = "QERL_KERNEL"
"""``qerl.kernel`` for the training workers, which see no settings of ours."""

RECOMPUTE_ENV = "QERL_RECOMPUTE"
"""``qerl.recompute`` for the training workers."""

BASE_ENV = "QERL_BASE"
"""Where actor and rollout use one copy of the base: JSON, see
:class:`qerl_verl.config.base.BaseSharing`."""

SOURCES_ENV = "QERL_SOURCE_MODELS"
"""JSON, role (actor, critic) -> name or path of the model as the user gave it, for the adapters
that training workers save."""

JOB_FOLDER_ENV = "QERL_JOB_FOLDER"
"""The job's own folder for temporary files, see platform/job_folder.py."""

EVALUATION_ENV = "QERL_EVALUATION_PROCESS"
"""Number of the process of ``qerl eval`` to which an engine's processes belong."""


def switched_on() -> bool:
    """Returns whether this process belongs to a job that runs with the switch."""
    return bool(os.environ.get(SWITCH_ENV))


def running_arm() -> str | None:
    """Returns the name of the job's arm, one of ``qerl_verl.config.arms.ARMS``; None without the
    switch."""
    return os.environ.get(SWITCH_ENV) or None
