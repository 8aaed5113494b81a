"""Names the environment variables by which the processes of a job know that the switch is on."""

import os

SWITCH_ENV = "QERL_SWITCH"
"""Name of the job's arm, set in every process of the job through Ray's runtime environment."""

ENGINE_VENDOR = "qerl"
"""``VERL_ENGINE_VENDOR`` of the job: the vendor of QeRL's engines in verl's EngineRegistry."""

KERNEL_ENV = "QERL_KERNEL"
"""``qerl.kernel``, for the training workers, which do not see QeRL's settings."""

RECOMPUTE_ENV = "QERL_RECOMPUTE"
"""``qerl.recompute``, for the training workers."""

BASE_ENV = "QERL_BASE"
"""Set where actor and rollout use one copy of the base: JSON of
:class:`qerl_verl.config.base.BaseSharing`."""

SOURCES_ENV = "QERL_SOURCE_MODELS"
"""JSON of role (actor, critic) -> the user's name or path of the model, for the adapters that
training workers save."""

JOB_FOLDER_ENV = "QERL_JOB_FOLDER"
"""The job's folder for temporary files, see platform/job_folder.py."""

EVALUATION_ENV = "QERL_EVALUATION_PROCESS"
"""Number of the ``qerl eval`` process to which an engine's processes belong."""


def switched_on() -> bool:
    """Returns whether this process belongs to a job that runs with the switch."""
    return bool(os.environ.get(SWITCH_ENV))


def running_arm() -> str | None:
    """Returns the name of the job's arm, one of ``qerl_verl.config.arms.ARMS``, or None."""
    return os.environ.get(SWITCH_ENV) or None
