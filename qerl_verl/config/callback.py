"""Defines the Hydra callback that the switch installs: it checks and prepares a run in the driver,
before Ray takes a GPU.

Hydra turns an exception of a callback into a warning and continues (hydra/_internal/callbacks.py),
so every refusal leaves as SystemExit.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from qerl_verl.config.arms import ARMS
from qerl_verl.config.base import describe_cost
from qerl_verl.config.checks import models, prompts, resume
from qerl_verl.config.checks.plugins import verl_policy_problem
from qerl_verl.config.draft import apply
from qerl_verl.config.host import Host
from qerl_verl.config.keys import MODEL, VARIABLES, get_value, written_keys
from qerl_verl.config.plan import plan
from qerl_verl.config.policy import describe_policy
from qerl_verl.config.replace_models import on_local_models, publish_models, replace_models
from qerl_verl.config.reserved import reserved
from qerl_verl.config.settings import QeRLSettings, SettingsError
from qerl_verl.log_lines import say
from qerl_verl.platform.waiting import start_watch

if TYPE_CHECKING:
    from qerl_verl.platform.lost_nodes import NodeWatch
    from qerl_verl.platform.lost_processes import LostProcess, ProcessWatch


def stop(problems: list[str]) -> NoReturn:
    """Ends the process before anything was started, and names every problem."""
    lines = "\n".join(f"  - {p}" for p in problems)
    sys.stderr.write(f"\n[qerl] The run was not started:\n{lines}\n\n")
    sys.stderr.flush()
    raise SystemExit(2)


class QeRLCallback(Callback):
    """Checks and prepares a run, once per job, on the composed configuration."""

    _nodes: NodeWatch | None = None
    _processes: ProcessWatch | None = None

    def on_run_start(self, config: DictConfig, **kwargs) -> None:
        from qerl_verl.platform.lost_nodes import watch_nodes
        from qerl_verl.platform.lost_processes import watch_processes
        from qerl_verl.platform.signals import end_driver_on_signals

        if not end_driver_on_signals():
            say("this version of Ray keeps SIGTERM for itself: a run that it ends has exit code 134")
        self._nodes, self._processes = watch_nodes(), watch_processes(say)
        if self._processes is None:
            say("this version of Ray calls no hooks: a run that loses a process may wait without end")
        try:
            prepare(config, written_keys(config))
        except SettingsError as error:
            stop(error.problems)
        except Exception as error:
            import traceback

            traceback.print_exc()
            stop([f"{type(error).__name__}: {error}"])

    def on_run_end(self, config: DictConfig, job_return, **kwargs) -> None:
        from hydra.core.utils import JobStatus

        failed = job_return.status == JobStatus.FAILED
        lost = self._processes.end(failed) if self._processes is not None else []
        if failed:
            error = job_return._return_value  # the property would raise it
            gone = self._nodes.find_lost(error, say) if self._nodes is not None else []
            say_losses(config, gone, lost)

    def on_multirun_start(self, config: DictConfig, **kwargs) -> None:
        stop(["--multirun: one QeRL run at a time; start the runs one by one"])


def prepare(config: DictConfig, keys: set[str]) -> None:
    """Carries a plan out, and does what comes before Ray: quantizes the models, makes the job's
    folder.

    Args:
        config: verl's composed configuration with the ``qerl`` node; changed in place.
        keys: dotted keys that the user wrote, see :func:`~qerl_verl.config.plan.plan`.

    Raises:
        SettingsError: what cannot run, all of it at once.
    """
    _check_that_verl_loaded_the_plugin()
    made = plan(config, keys, Host.here())
    for line in made.lines:
        say(line)
    if made.problems:
        raise SettingsError(made.problems)
    apply(config, made.changes)
    if made.platform == "cpu":
        _use_cpu_in_this_process()
    remote = models.remote_paths(config)
    bases = replace_models(config, made.settings, made.quantization)
    publish_models(config)
    if MODEL in bases and ARMS[made.settings.arm].container:
        say(f"base: {describe_cost(bases[MODEL], made.shares_base)}")
    local = on_local_models(config, bases)  # with what the hub has sent meanwhile
    problems = models.find_misfits(local, made.adapters) + resume.find_problems(local, made.adapters)
    if problems := problems + (prompts.find_problems(local, bases[MODEL]) if remote else []):
        raise SettingsError(problems)
    with open_dict(config):
        config.qerl.policy = describe_policy(local, made.adapters)
    if made.cluster is None:
        give_job_folder(config)
        shorten_start(config, made.settings)
    needed = reserved(partial(get_value, config))
    start_watch(needed.gpus, needed.cpus, say)


def say_losses(config: DictConfig, nodes: list[str], processes: list[LostProcess]) -> None:
    """Prints what the run has lost and how it goes on. Prints nothing where nothing was lost.

    Args:
        nodes: those that are gone, each with Ray's reason.
        processes: those that are gone, in the order of their ends.
    """
    # a new start meets the same error
    processes = [process for process in processes if process.started]
    for node in nodes:
        say(f"the run has ended because a node is gone: {node}")
    if processes and not nodes:
        say(f"the run has ended because a process is gone: {processes[0].name}; the lines above say why")
    if nodes or processes:
        when = "when the cluster has its nodes again" if nodes else "when the reason is fixed"
        say(
            f"start the same command {when}: with trainer.resume_mode=auto it goes on from the "
            f"last whole checkpoint in {OmegaConf.select(config, 'trainer.default_local_dir')}"
        )


def shorten_start(config: DictConfig, settings: QeRLSettings) -> None:
    """Sets what :mod:`qerl_verl.platform.start` knows for a job that starts Ray itself. What the
    user has set stays."""
    from qerl_verl.nvfp4.cache import default_cache_dir
    from qerl_verl.platform.start import bytecode_environment, find_uncompiled, set_ray_environment

    set_ray_environment()
    cache = Path(settings.cache_dir) if settings.cache_dir else default_cache_dir()
    variables, line = bytecode_environment(cache.absolute(), os.environ, find_uncompiled())
    if line:
        say(line)
    _add_job_variables(config, variables)


def _add_job_variables(config: DictConfig, variables: dict[str, str]) -> None:
    """Adds environment variables for the job's processes. The user's own take precedence."""
    merged = variables | dict(OmegaConf.select(config, VARIABLES) or {})
    OmegaConf.update(config, VARIABLES, merged, force_add=True)


def give_job_folder(config: DictConfig) -> None:
    """Gives the processes of a job that starts Ray itself a folder for temporary files, which is
    removed with the job. What the user has put into the runtime environment stays."""
    from qerl_verl.platform.job_folder import environment, open_job_folder

    try:
        folder = open_job_folder()
    except OSError as error:
        say(f"the job has no folder of its own for temporary files ({error}): what it leaves there stays after its end")
        return
    _add_job_variables(config, environment(folder))


def _check_that_verl_loaded_the_plugin() -> None:
    """Raises SettingsError where verl did not load it although nothing keeps verl from it."""
    if "qerl_verl.plugin" not in sys.modules and not verl_policy_problem(os.environ):
        raise SettingsError(
            ["verl did not load the plugin qerl; reinstall qerl-verl (`qerl doctor` checks the installation)"]
        )


def _use_cpu_in_this_process() -> None:
    from verl.plugin.platform import set_platform

    from qerl_verl.config.rules import CPU_ENVIRONMENT
    from qerl_verl.platform.cpu import PlatformCPU

    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    set_platform(PlatformCPU())
