"""What a run would do, worked out without starting, downloading, quantizing or writing anything.

The Hydra callback carries a plan out and ``qerl explain`` prints it, so both say the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config import quantization
from qerl_verl.config.adapters import adopt_adapter
from qerl_verl.config.arms import get_arm
from qerl_verl.config.base import choose_base, find_obstacle, share_base
from qerl_verl.config.checks import arms, data, models, plugins, recipe, resources, resume
from qerl_verl.config.host import Host, choose_platform
from qerl_verl.config.quantization import Choice, choose_quantization
from qerl_verl.config.rules import MODEL, apply_rules, trained_models
from qerl_verl.config.settings import QeRLSettings, SettingsError
from qerl_verl.platform.ray_cluster import RAY_INIT, RayCluster, find_cluster
from qerl_verl.versions import untested_versions


@dataclass
class Plan:
    """A run that has not begun.

    Attributes:
        problems: what cannot work, one sentence each with the key and the fix. With any, the run is
            not started.
        lines: what the user reads: each value that the switch sets, with its reason, and what else
            there is to know.
        platform: ``cuda`` or ``cpu``.
        settings: everything under ``qerl.*``.
        cluster: the Ray cluster that is joined, None where the run starts Ray.
        unseen: what a run would look at too and was left out, one line each.
        adapters: of each trained model that goes on from an adapter, see
            :func:`~.adapters.adopt_adapter`.
        quantization: how a model is quantized that is not yet; None where the arm does not.
        shares_base: whether actor and rollout are to use one copy of the base.
    """

    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    platform: str = ""
    settings: QeRLSettings = field(default_factory=QeRLSettings)
    cluster: RayCluster | None = None
    unseen: list[str] = field(default_factory=list)
    adapters: dict[str, dict] = field(default_factory=dict)
    quantization: Choice | None = None
    shares_base: bool = False


def plan(config: DictConfig, keys: set[str], host: Host, platform: str | None = None, here: bool = True) -> Plan:
    """Check a composed configuration and set in it what QeRL needs, in place.

    Args:
        config: verl's configuration with the ``qerl`` node.
        keys: dotted keys that the user wrote, on the command line or in files of their own.
        host: the driver's machine.
        platform: ``cuda`` or ``cpu`` for a run on another machine; None chooses by ``host``.
        here: False where the run takes place on another machine: this one's files, CPUs, GPUs and
            Ray say nothing then.
    """
    made = Plan()
    if problem := _other_program(config):
        return Plan(problems=[problem])
    job_environment = OmegaConf.select(config, f"{RAY_INIT}.runtime_env.env_vars") or {}
    made.problems += plugins.find_problems(host.environment, job_environment)
    if line := untested_versions():
        made.lines.append(line)
    try:
        made.settings = QeRLSettings.of(config)
        made.cluster = find_cluster(OmegaConf.select(config, RAY_INIT) or {}, host.environment)
        made.platform = platform or _choose(made, host)
    except SettingsError as error:
        made.problems += error.problems
        return made
    for model in trained_models(config) if here else ():
        try:
            if adapter := adopt_adapter(config, keys, model):
                made.adapters[model] = adapter
        except SettingsError as error:
            made.problems += error.problems
    apply_rules(
        config,
        keys,
        on_cpu=made.platform == "cpu",
        notify=made.lines.append,
        starts_ray=made.cluster is None,
        environment=host.environment,
    )
    _plan_base(made, config, host)
    gpu = made.platform == "cuda" and (platform == "cuda" or host.gpus > 0)
    made.quantization = choose_quantization(config, made.settings, gpu)
    if made.quantization and models.find_unquantized(config):
        made.lines.append(made.quantization.line)
        made.problems += quantization.find_problems(made.quantization, here)
    made.lines += recipe.find_remarks(config)
    made.problems += recipe.find_problems(config, keys) + arms.find_problems(config, host.environment)
    if here:
        made.lines += data.find_remarks(config)
        made.problems += data.find_problems(config) + _model_problems(config, made.adapters)
        made.problems += resume.find_problems(config, made.adapters)
        made.unseen += [f"{path}, which is not on this machine yet" for path in models.remote_paths(config)]
    else:
        made.unseen.append("data, model folders, CPUs, GPUs and Ray (--elsewhere)")
    if here and platform == "cuda" and not host.gpus and made.cluster is None:
        made.unseen.append("CPUs and GPUs, since this machine has no GPU")
    elif here:
        made.lines += resources.find_remarks(config, made.cluster)
        made.problems += resources.find_problems(config, host, made.cluster)
    return made


def _plan_base(made: Plan, config: DictConfig, host: Host) -> None:
    """Decide whether actor and rollout share the base, and set what that needs."""
    if not get_arm(config).container:
        return
    setting, obstacle = made.settings.base, find_obstacle(config, host.environment)
    made.shares_base, reason = choose_base(setting, obstacle, made.platform == "cpu")
    if setting == "shared" and obstacle:
        made.problems.append(f"qerl.base=shared: {obstacle}; use qerl.base=auto or separate")
    else:
        how = "one copy for actor and rollout" if made.shares_base else "a copy each in actor and rollout"
        made.lines.append(f"base: {how} ({reason})")
    if made.shares_base:
        if made.settings.rollout.sleep_level == 2:
            made.lines.append("qerl.rollout.sleep_level=2 has no effect: a shared base stays where it is")
        share_base(config, made.lines.append)


def _model_problems(config: DictConfig, adapters: dict[str, dict]) -> list[str]:
    """What keeps the run from using its models, as far as they lie on this machine, and their
    tokenizer on the data."""
    problems, folder = models.find_problems(config, adapters), models.local_folder(config, MODEL)
    return problems or (data.find_prompt_problems(config, folder) if folder else [])


def _other_program(config: DictConfig) -> str | None:
    if "qerl" not in config:
        return "the switch is off: add +qerl=nvfp4, or `- qerl: nvfp4` to the recipe's defaults list"
    if OmegaConf.select(config, "actor_rollout_ref") is None:
        return "qerl is a switch for `python -m verl.trainer.main_ppo`; this is another program's configuration"
    return None


def _choose(made: Plan, host: Host) -> str:
    platform, reason = choose_platform(made.settings.platform, host, joins=made.cluster is not None)
    made.lines.append(f"platform: {platform} ({reason})")
    return platform
