"""Tells the processes of a job that the switch is on."""

import os

from qerl_verl.job import JOB_ENV, this_job

ENGINE_VENDOR = "qerl"
"""``VERL_ENGINE_VENDOR`` of the job: the vendor of QeRL's engines in verl's EngineRegistry."""

JOB_FOLDER_ENV = "QERL_JOB_FOLDER"
"""The job's folder for temporary files, see platform/job_folder.py."""

EVALUATION_ENV = "QERL_EVALUATION_PROCESS"
"""Number of the ``qerl eval`` process to which an engine's processes belong."""


def switched_on() -> bool:
    """Returns whether this process belongs to a job that runs with the switch."""
    return bool(os.environ.get(JOB_ENV))


def running_arm() -> str | None:
    """Returns the name of the job's arm, one of ``qerl_verl.config.arms.ARMS``, or None.

    Raises:
        JobError: the job's document cannot be followed.
    """
    return this_job().settings.arm if switched_on() else None
