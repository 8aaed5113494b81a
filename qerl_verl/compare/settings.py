"""Reads the configuration of a run, and decides whether runs can be compared.

The first of these sources is used: the record that QeRL's trainers write beside the metrics
(:mod:`qerl_verl.trainer.run_record`), Hydra's ``.hydra/config.yaml`` in the run's folder, and the
configuration that verl prints at the start of a console log.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qerl_verl.compare.runs import METRICS_SUFFIX, RECORD_SUFFIX, Run, find_logs

CONTENT = ".sha256"
"""Suffix of the record's key for the SHA-256 of the file or list that ``key`` names."""

MODEL = "model"
"""Key of ``actor_rollout_ref.model.path`` before the switch replaced it by a folder of its
cache."""

_MUST_AGREE = (
    "data.train_files",
    "data.val_files",
    "data.train_max_samples",
    "data.val_max_samples",
    "data.prompt_key",
    "data.train_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.custom_cls.",
    "actor_rollout_ref.rollout.n",
    "actor_rollout_ref.rollout.temperature",
    "actor_rollout_ref.rollout.top_p",
    "actor_rollout_ref.rollout.top_k",
    "actor_rollout_ref.rollout.val_kwargs.",
    "reward.custom_reward_function.",
    "reward.reward_manager.",
    "reward.reward_model.enable",
    "reward.reward_model.model_path",
    "custom_reward_function.",
    "reward_model.",
)
"""Settings that define the meaning of a reward; a dot at the end includes all keys below."""

_GROUPS = (
    MODEL,
    "data",
    "actor_rollout_ref",
    "critic",
    "algorithm",
    "reward",
    "reward_model",
    "trainer",
    "qerl",
)
"""First parts of the keys that are compared. Other keys belong to a recipe or to logging."""

_NOT_COMPARED = re.compile(
    "|".join((
        r"(^|[._])seed$",
        r"_target_$",
        r"_dir$",
        r"\.sha256$",
        r"(tokenizer|hf_config)_path$",
        r"profiler\.",
        r"\.trace\.",
        r"gpu_memory_utilization$",
        r"served_model_name$",
        r"^(actor_rollout_ref|critic)\.model\.path$",  # MODEL stands for it
        r"^qerl\.(policy|base_fingerprint|source_models)\b",
        r"^trainer\.(project_name|experiment_name|logger|resume_\w+|test_freq|save_freq|v1\.)",
        r"^trainer\.(max_\w+_ckpt_to_keep|val_before_train)",
    ))
)  # fmt: skip
"""Seeds, names, folders, and settings that only affect logging or speed."""

_SEEDS = (
    "data.seed",
    "actor_rollout_ref.rollout.seed",
    "actor_rollout_ref.actor.fsdp_config.seed",
    "qerl.aqn.seed",
)


def read_settings(path: Path, alone: bool) -> dict[str, Any] | None:
    """Returns the configuration of the run with the metrics in ``path``, by dotted keys.

    Args:
        path: a metrics file or a console log.
        alone: whether no other run has its metrics in the same folder. A ``.hydra`` folder below
            it, or a console log in it, then belongs to this run.

    Returns:
        None where no source exists or none can be read.
    """
    record = path.with_suffix(RECORD_SUFFIX)
    if record.is_file():
        try:
            settings = json.loads(record.read_text())["settings"]
            return _normalize(settings) if isinstance(settings, dict) else None
        except (ValueError, KeyError, TypeError):
            return None
    if alone and (found := _hydra_settings(path.parent)):
        return found
    logs = find_logs(path.parent) if alone and path.suffix == METRICS_SUFFIX else [path]
    return next((found for log in logs if (found := _printed_settings(log))), None)


def _hydra_settings(folder: Path) -> dict[str, Any] | None:
    """Reads the newest ``.hydra/config.yaml`` in the folder or up to three levels below it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    patterns = ("", "*/", "*/*/", "*/*/*/")
    files = [f for p in patterns for f in folder.glob(f"{p}.hydra/config.yaml")]
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True):
        try:
            config = OmegaConf.load(file)
            content = OmegaConf.to_container(config)
        except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError):
            continue
        if not isinstance(content, dict) or "actor_rollout_ref" not in content:
            continue
        out = {}
        for key, value in _flatten(content).items():
            if "${" in str(value):
                try:
                    value = OmegaConf.select(config, key)
                except OmegaConfBaseException:  # an interpolation that only a run can resolve
                    continue
                if OmegaConf.is_config(value):
                    value = OmegaConf.to_container(value, resolve=True)
            out[key] = value
        return _normalize(out)
    return None


_PRINTED_START = re.compile(r"^(\x1b\[\d+m\(TaskRunner\w* pid=\d+[^)]*\)\x1b\[0m |\(TaskRunner\w* pid=\d+[^)]*\) )?\{'")
_PRINTED_LINES = 5000


def _printed_settings(path: Path) -> dict[str, Any] | None:
    """Reads the dictionary that ``verl.trainer.main_ppo`` prints before it trains."""
    prefix, lines, depth = None, [], 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if prefix is None:
                match = _PRINTED_START.match(line)
                if match is None or "'actor_rollout_ref'" not in line:
                    continue
                prefix = match.group(1) or ""
            elif not line.startswith(prefix):
                continue
            lines.append(line[len(prefix) :])
            depth += line.count("{") - line.count("}")
            if depth <= 0 or len(lines) > _PRINTED_LINES:
                break
    try:
        found = ast.literal_eval("".join(lines).strip())
    except (ValueError, SyntaxError):
        return None
    return _normalize(_flatten(found)) if isinstance(found, dict) else None


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix: node}
    out: dict[str, Any] = {}
    for key, value in node.items():
        out |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return out


def _normalize(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Brings all sources to one form: a single data file becomes a list, :data:`MODEL` is set."""
    out = dict(settings)
    for key in ("data.train_files", "data.val_files"):
        if isinstance(out.get(key), str):
            out[key] = [out[key]]
    out[MODEL] = out.get("qerl.source_models.actor", out.get("actor_rollout_ref.model.path"))
    out[f"{MODEL}{CONTENT}"] = out.get("qerl.base_fingerprint.actor")
    return out


def find_seed(settings: Mapping[str, Any] | None) -> int | None:
    """Returns the first of verl's seeds that has a value."""
    values = ((settings or {}).get(key) for key in _SEEDS)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


@dataclass
class Agreement:
    """Common and differing settings of the compared runs.

    Attributes:
        conflicts: sentences about differences that make a comparison meaningless.
        differing: key -> arm -> value, for other settings that differ between arms.
        unknown: names of the runs whose settings are not known.
    """

    conflicts: list[str] = field(default_factory=list)
    differing: dict[str, dict[str, Any]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def compare_settings(arms: Mapping[str, list[Run]]) -> Agreement:
    """Compares the settings of all runs whose settings are known.

    A key that a run's configuration lacks, for example that of another version of verl, is not
    compared for this run.

    Args:
        arms: arm -> its runs.
    """
    out = Agreement(unknown=[run.name for runs in arms.values() for run in runs if run.settings is None])
    everything = [run for runs in arms.values() for run in runs]
    keys = sorted({key for run in everything for key in run.settings or () if _is_compared(key)})
    for key in keys:
        having = {arm: [run for run in runs if key in (run.settings or ())] for arm, runs in arms.items()}
        if len(_by_value([run for runs in having.values() for run in runs], key)) < 2:
            continue
        mixed = {arm: runs for arm, runs in having.items() if len(_by_value(runs, key)) > 1}
        if _must_agree(key):
            out.conflicts.append(_disagreement(key, [run for runs in having.values() for run in runs]))
        elif mixed:
            out.conflicts += [
                f"the runs of arm {arm} are not seeds of one arm, give each its own (ARM=GLOB): "
                + _disagreement(key, runs)
                for arm, runs in mixed.items()
            ]
        else:
            out.differing[key] = {arm: _value(runs[0], key) for arm, runs in having.items() if runs}
    return out


def _is_compared(key: str) -> bool:
    return key.partition(".")[0] in _GROUPS and not _NOT_COMPARED.search(key)


def _must_agree(key: str) -> bool:
    return any(key == k or (k.endswith(".") and key.startswith(k)) for k in _MUST_AGREE)


def _value(run: Run, key: str) -> Any:
    return (run.settings or {})[key]


def _by_value(runs: list[Run], key: str) -> list[list[Run]]:
    """Groups runs by equal value of a setting.

    Files are compared by content where the records of all runs have it. A model at two paths is the
    same if its bytes are. A model at one path is the same in two arms, which quantize it
    differently.
    """
    content = f"{key}{CONTENT}"
    if runs and all((run.settings or {}).get(content) for run in runs):
        if key != MODEL or len({_value(run, key) for run in runs}) > 1:
            key = content
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_value(run, key), sort_keys=True, default=str), []).append(run)
    return list(groups.values())


def _disagreement(key: str, runs: list[Run]) -> str:
    said = []
    for group in _by_value(runs, key):
        names = ", ".join(run.name for run in group[:3]) + (f" and {len(group) - 3} more" if len(group) > 3 else "")
        said.append(f"{show_value(_value(group[0], key))} ({names})")
    return f"{key} is {' and '.join(said)}"


def show_value(value: Any) -> str:
    """Returns a setting's value as text for a sentence or a table."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "null" if value is None else str(value)
