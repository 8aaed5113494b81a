"""Makes the plan of a run, as a pure function of the configuration, the user's keys and the
machine.

Nothing is started, downloaded, quantized or written, and the configuration is not changed. The
Hydra callback carries a plan out and ``qerl explain`` prints it, so both say the same.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config import quantization
from qerl_verl.config.adapters import adopt_adapter
from qerl_verl.config.arms import get_arm
from qerl_verl.config.base import choose_base, find_obstacle, share_base
from qerl_verl.config.checks import arms, data, models, plugins, prompts, recipe, resources, resume
from qerl_verl.config.delta_nets import serve_delta_nets
from qerl_verl.config.draft import Change, Draft
from qerl_verl.config.host import Host, choose_platform
from qerl_verl.config.quantization import Choice, choose_quantization
from qerl_verl.config.rules import MODEL, apply_rules, trained_models
from qerl_verl.config.settings import QeRLSettings, SettingsError
from qerl_verl.platform.ray_cluster import RAY_INIT, RayCluster, find_cluster
from qerl_verl.versions import untested_versions


@dataclass
class Plan:
    """The plan of a run that has not begun.

    Attributes:
        changes: values that the switch sets in the configuration, in order.
        problems: why the run cannot work, one sentence each with the key and the fix. A run with
            problems is not started.
        lines: lines for the user: each change with its reason, and remarks.
        platform: ``cuda`` or ``cpu``.
        settings: everything under ``qerl.*``.
        config: a copy of the configuration with the changes.
        cluster: the Ray cluster that is joined, None if the run starts Ray.
        unseen: checks of a run that were left out, one line each.
        adapters: for each trained model that starts from an adapter, the result of
            :func:`~.adapters.adopt_adapter`.
        quantization: how an unquantized model is quantized; None if the arm does not quantize.
        shares_base: whether actor and rollout are to use one copy of the base.
    """

    changes: list[Change] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    platform: str = ""
    settings: QeRLSettings = field(default_factory=QeRLSettings)
    config: DictConfig = field(default_factory=OmegaConf.create)
    cluster: RayCluster | None = None
    unseen: list[str] = field(default_factory=list)
    adapters: dict[str, dict] = field(default_factory=dict)
    quantization: Choice | None = None
    shares_base: bool = False


def plan(
    config: DictConfig,
    keys: Collection[str],
    host: Host,
    platform: str | None = None,
    here: bool = True,
) -> Plan:
    """Checks a composed configuration, and determines what QeRL changes in it.

    Args:
        config: verl's configuration with the ``qerl`` node. It is not changed.
        keys: dotted keys that the user wrote, on the command line or in files of their own.
        host: the driver's machine.
        platform: ``cuda`` or ``cpu`` for a run on another machine; None chooses by ``host``.
        here: False if the run takes place on another machine, for which this machine's files,
            CPUs, GPUs and Ray say nothing.
    """
    draft = Draft(copy.deepcopy(config))
    made = Plan(config=draft.config, changes=draft.changes, lines=draft.lines)
    if problem := _other_program(draft.config):
        made.problems.append(problem)
        return made
    job_environment = draft.get(f"{RAY_INIT}.runtime_env.env_vars") or {}
    made.problems += plugins.find_problems(host.environment, job_environment)
    if line := untested_versions():
        draft.say(line)
    try:
        made.settings = QeRLSettings.of(draft.config)
        made.cluster = find_cluster(draft.get(RAY_INIT) or {}, host.environment)
        made.platform = platform or _choose(made, draft, host)
    except SettingsError as error:
        made.problems += error.problems
        return made
    for model in trained_models(draft.config) if here else ():
        try:
            if adapter := adopt_adapter(draft, keys, model):
                made.adapters[model] = adapter
        except SettingsError as error:
            made.problems += error.problems
    apply_rules(
        draft,
        keys,
        on_cpu=made.platform == "cpu",
        starts_ray=made.cluster is None,
        environment=host.environment,
    )
    if here:
        serve_delta_nets(draft)
    _plan_base(made, draft, host)
    gpu = made.platform == "cuda" and (platform == "cuda" or host.gpus > 0)
    made.quantization = choose_quantization(draft.config, made.settings, gpu)
    if made.quantization and models.find_unquantized(draft.config):
        draft.say(made.quantization.line)
        made.problems += quantization.find_problems(made.quantization, here)
    _check(made, keys, host, here)
    if here and platform == "cuda" and not host.gpus and made.cluster is None:
        made.unseen.append("CPUs and GPUs, since this machine has no GPU")
    elif here:
        made.lines += resources.find_remarks(draft.config, made.cluster)
        made.problems += resources.find_problems(draft.config, host, made.cluster)
    return made


def _check(made: Plan, keys: Collection[str], host: Host, here: bool) -> None:
    """Checks the changed configuration, and with ``here`` the files that it names."""
    config = made.config
    made.lines += recipe.find_remarks(config, [change.key for change in made.changes])
    made.problems += recipe.find_problems(config, keys)
    made.problems += arms.find_problems(config, host.environment)
    if not here:
        made.unseen.append("data, model folders, CPUs, GPUs and Ray (--elsewhere)")
        return
    made.lines += data.find_remarks(config)
    made.problems += data.find_problems(config) + _model_problems(config, made.adapters)
    made.problems += resume.find_problems(config, made.adapters)
    made.unseen += [
        f"{path}, which is not on this machine yet; `qerl resolve` downloads and checks it"
        for path in models.remote_paths(config)
    ]


def _plan_base(made: Plan, draft: Draft, host: Host) -> None:
    """Decides whether actor and rollout share the base, and makes the changes that sharing
    requires.
    """
    if not get_arm(draft.config).container:
        return
    setting, obstacle = made.settings.base, find_obstacle(draft.config, host.environment)
    made.shares_base, reason = choose_base(setting, obstacle, made.platform == "cpu")
    if setting == "shared" and obstacle:
        made.problems.append(f"qerl.base=shared: {obstacle}; use qerl.base=auto or separate")
    else:
        how = "one copy for actor and rollout" if made.shares_base else "a copy each in actor and rollout"
        draft.say(f"base: {how} ({reason})")
    if made.shares_base:
        if made.settings.rollout.sleep_level == 2:
            draft.say("qerl.rollout.sleep_level=2 has no effect: a shared base stays where it is")
        share_base(draft)


def _model_problems(config: DictConfig, adapters: dict[str, dict]) -> list[str]:
    """Returns why the run cannot use those of its models that lie on this machine, or their
    tokenizer on the data.
    """
    problems, folder = models.find_problems(config, adapters), models.local_folder(config, MODEL)
    return problems or (prompts.find_problems(config, folder) if folder else [])


def _other_program(config: DictConfig) -> str | None:
    if "qerl" not in config:
        return "the switch is off: add +qerl=nvfp4, or `- qerl: nvfp4` to the recipe's defaults list"
    if OmegaConf.select(config, "actor_rollout_ref") is None:
        return "qerl is a switch for `python -m verl.trainer.main_ppo`; this is another program's configuration"
    return None


def _choose(made: Plan, draft: Draft, host: Host) -> str:
    joins = made.cluster is not None
    platform, reason = choose_platform(made.settings.platform, host, joins)
    draft.say(f"platform: {platform} ({reason})")
    return platform
