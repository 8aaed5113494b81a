"""The Hydra callback that the switch installs: checks and prepares a run in the driver, before Ray takes a GPU.

Hydra turns an exception of a callback into a warning and goes on (hydra/_internal/callbacks.py), so every refusal
leaves as SystemExit.
"""

from __future__ import annotations

import copy
import os
import secrets
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
from qerl_verl.config.draft import Draft, apply
from qerl_verl.config.host import Host
from qerl_verl.config.keys import VARIABLES, get_value, written_keys
from qerl_verl.config.plan import plan
from qerl_verl.config.policy import describe_policy
from qerl_verl.config.publish import published, republish
from qerl_verl.config.quantization import Choice, choose_quantization
from qerl_verl.config.reserved import reserved
from qerl_verl.config.rules import CRITIC, MODEL, trained_models
from qerl_verl.config.settings import QeRLSettings, SettingsError
from qerl_verl.job import BaseSharing
from qerl_verl.platform.waiting import start_watch

if TYPE_CHECKING:
    from qerl_verl.nvfp4.cache import Quantization
    from qerl_verl.platform.lost_nodes import NodeWatch
    from qerl_verl.platform.lost_processes import LostProcess, ProcessWatch


def say(text: str) -> None:
    """One line of the driver's, in verl's log."""
    print(f"[qerl] {text}", flush=True)


def stop(problems: list[str]) -> NoReturn:
    """End the process before anything was started, naming every problem."""
    lines = "\n".join(f"  - {p}" for p in problems)
    sys.stderr.write(f"\n[qerl] The run was not started:\n{lines}\n\n")
    sys.stderr.flush()
    raise SystemExit(2)


class QeRLCallback(Callback):
    """Runs once per job, on the composed configuration."""

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
    """Carry a plan out, with what comes before Ray: quantize the models, make the job's folder.

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
    bases = _replace_models(config, made.settings, made.quantization)
    _publish_models(config)
    if MODEL in bases and ARMS[made.settings.arm].container:
        say(f"base: {describe_cost(bases[MODEL], made.shares_base)}")
    local = _on_local_models(config, bases)  # what the hub has sent is looked at now
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


def _publish_models(config: DictConfig) -> None:
    """Tell the run's processes what the models were called, and where a base is shared, which one
    and by which key."""
    sources, sharing = get_value(config, "qerl.source_models") or {}, published(config).sharing
    if sharing is not None:
        sharing = BaseSharing(secrets.token_hex(16), get_value(config, f"{MODEL}.path"))
    republish(Draft(config), sources=dict(sources), sharing=sharing)


def say_losses(config: DictConfig, nodes: list[str], processes: list[LostProcess]) -> None:
    """Name what the run has lost, and say how it goes on. Nothing where nothing was lost.

    Args:
        nodes: those that are gone, each with Ray's reason.
        processes: those that are gone, in the order of their ends.
    """
    processes = [process for process in processes if process.started]  # a new start meets the same error
    for node in nodes:
        say(f"the run has ended because a node is gone: {node}")
    if processes and not nodes:
        say(f"the run has ended because a process is gone: {processes[0].name}; the lines above say why")
    if nodes or processes:
        when = "when the cluster has its nodes again" if nodes else "when the reason is mended"
        say(
            f"start the same command {when}: with trainer.resume_mode=auto it goes on from the last whole "
            f"checkpoint in {OmegaConf.select(config, 'trainer.default_local_dir')}"
        )


def shorten_start(config: DictConfig, settings: QeRLSettings) -> None:
    """What :mod:`qerl_verl.platform.start` sets for a job that starts Ray itself. What the user has set stays."""
    from qerl_verl.nvfp4.cache import default_cache_dir
    from qerl_verl.platform.start import bytecode_environment, find_uncompiled, set_ray_environment

    set_ray_environment()
    cache = Path(settings.cache_dir) if settings.cache_dir else default_cache_dir()
    variables, line = bytecode_environment(cache.absolute(), os.environ, find_uncompiled())
    if line:
        say(line)
    _add_job_variables(config, variables)


def _add_job_variables(config: DictConfig, variables: dict[str, str]) -> None:
    """Put environment variables into those of the job's processes, beside the user's own, which win."""
    merged = variables | dict(OmegaConf.select(config, VARIABLES) or {})
    OmegaConf.update(config, VARIABLES, merged, force_add=True)


def give_job_folder(config: DictConfig) -> None:
    """Give the processes of a job that starts Ray itself a folder for temporary files that ends with it. What the user
    has put into the runtime environment stays."""
    from qerl_verl.platform.job_folder import environment, open_job_folder

    try:
        folder = open_job_folder()
    except OSError as error:
        say(f"the job has no folder of its own for temporary files ({error}): what it leaves there stays after its end")
        return
    _add_job_variables(config, environment(folder))


def _check_that_verl_loaded_the_plugin() -> None:
    """Raises: SettingsError, where verl did not load it although nothing keeps it from doing so."""
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


def _replace_models(config: DictConfig, settings: QeRLSettings, choice: Choice | None = None) -> dict[str, Path]:
    """Replace model paths by what the arm runs: a packed checkpoint, quantized where it is not yet, or the model itself. The
    same model twice is the same checkpoint.

    Returns:
        The local folder of each trained model's base.
    """
    from qerl_verl.nvfp4.cache import fingerprint

    arm, trained = ARMS[settings.arm], trained_models(config)
    sources = {model: OmegaConf.select(config, f"{model}.path") for model in trained}  # before one may refer to another
    choice = choice or choose_quantization(config, settings, gpu=False)
    folders: dict[str, Path] = {}
    for model, source in sources.items():
        if source not in folders:
            folders[source] = _resolve(f"{model}.path", source, settings, choice)
    with open_dict(config):
        roles = {model: "critic" if model == CRITIC else "actor" for model in trained}
        config.qerl.source_models = {roles[model]: _lasting_name(source) for model, source in sources.items()}
        config.qerl.base_fingerprint = {
            roles[model]: fingerprint(folders[source], settings.cache_dir) for model, source in sources.items()
        }
        for model, source in sources.items():
            # a name on the hub stays one where the model is used as it is: other nodes have their own copies
            if arm.container or os.path.exists(os.path.expanduser(source)):
                OmegaConf.update(config, f"{model}.path", str(folders[source]))
    if CRITIC in trained:
        say("critic: the same checkpoint" if sources[CRITIC] == sources[MODEL] else "critic: a checkpoint of its own")
    return {model: folders[source] for model, source in sources.items()}


def _quantization(choice: Choice) -> Quantization:
    """What the cache asks for; the text is read when it is needed."""
    from verl.utils.fs import copy_to_local

    from qerl_verl.nvfp4.cache import Quantization
    from qerl_verl.nvfp4.calibration import Calibration, read_calibration
    from qerl_verl.nvfp4.errors import CheckpointError

    def calibration(model: Path) -> Calibration:
        files = [copy_to_local(file) if "://" in file else file for file in choice.files]
        try:
            return read_calibration(
                files,
                model,
                samples=choice.samples,
                sample_tokens=choice.sample_tokens,
                prompt_key=choice.prompt_key,
                chat_template=choice.chat_template,
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} Set qerl.quantization.calibration to a file with text, or qerl.quantization.method=four-over-six."
            ) from error

    return Quantization(choice.method, calibration, choice.device, isolated=choice.device == "cuda")


def _on_local_models(config: DictConfig, bases: dict[str, Path]) -> DictConfig:
    """A copy of the configuration whose models are local folders, for checks that read them."""
    config = copy.deepcopy(config)
    for model, folder in bases.items():
        OmegaConf.update(config, f"{model}.path", str(folder))
    return config


def _lasting_name(path: str) -> str:
    """A model's name or path for what is read in another folder, or later: that of a local folder is absolute."""
    folder = os.path.expanduser(path)
    return os.path.abspath(folder) if "://" not in path and os.path.isdir(folder) else path


def _resolve(key: str, path: str, settings: QeRLSettings, choice: Choice | None) -> Path:
    """The folder of a model in the arm's form, said aloud.

    Raises:
        SettingsError: the model cannot be had or cannot be quantized; names ``key``.
    """
    from verl.utils.fs import copy_to_local

    from qerl_verl.nvfp4.cache import resolve_checkpoint, resolve_source
    from qerl_verl.nvfp4.errors import CheckpointError
    from qerl_verl.nvfp4.validation import check_method

    arm = ARMS[settings.arm]
    local = copy_to_local(path) if "://" in path else os.path.expanduser(path)  # hdfs and the like: verl knows how
    try:
        if not arm.container:
            folder = resolve_source(local).absolute()
            say(f"model: {folder} ({arm.base})")
            return folder
        assert choice is not None, "an arm whose base is packed has a method"
        resolved = resolve_checkpoint(local, settings.cache_dir, _quantization(choice))
        check_method(resolved.path, arm.name)
    except CheckpointError as error:
        raise SettingsError([f"{key}={path}: {error}"]) from error
    say(f"model: {resolved.path} ({arm.base}, {resolved.kind})")
    for note in resolved.notes:
        say(f"{key}: {note}")
    return resolved.path.absolute()
