"""Checks of the data files against batch size and steps, before Ray starts.

Only files that verl's own data set class (verl/utils/dataset/rl_dataset.py) would read are checked.
With ``data.custom_cls`` the files are the user's responsibility. A file on a remote file system is
left to verl.
"""

from __future__ import annotations

import glob
import os
from dataclasses import dataclass
from functools import partial

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config.keys import Get, get_value
from qerl_verl.data.steps import ends_early, epochs_for, reachable_steps

FORMATS = (".parquet", ".json", ".jsonl")


@dataclass(frozen=True)
class Files:
    """The files of one setting, ``data.train_files`` or ``data.val_files``.

    Attributes:
        key: the setting.
        paths: local files; empty if they are remote or there is a problem.
        rows: number of prompts that verl takes from them; None if they are not counted.
        problems: what is wrong with them.
    """

    key: str
    paths: tuple[str, ...] = ()
    rows: int | None = None
    problems: tuple[str, ...] = ()


def find_problems(config: DictConfig) -> list[str]:
    """Returns the problems of files that do not exist or hold fewer prompts than a batch, one
    sentence each.
    """
    get = partial(get_value, config)
    if get("data.custom_cls.path"):
        return []
    train, validation = look_at(get, "data.train_files"), look_at(get, "data.val_files")
    out = [*train.problems, *validation.problems]
    batch = get("data.train_batch_size")
    if train.rows is not None and train.rows < batch:
        out.append(
            f"data.train_batch_size={batch}: the training data has {train.rows} prompts "
            f"({train.key}={get(train.key)}), so there is no batch; set it to "
            f"{train.rows or 'a smaller number'} or less, or give more data"
        )
    generated = get("data.gen_batch_size")
    if generated and train.rows is not None and batch <= train.rows < generated:
        out.append(f"data.gen_batch_size={generated}: the training data has {train.rows} prompts; set it to {batch}")
    if validation.rows == 0:
        out.append(
            f"{validation.key}={get(validation.key)}: no prompt in it; verl validates on it before the first step"
        )
    return out


def find_remarks(config: DictConfig) -> list[str]:
    """Returns a remark on a run that ends before the number of steps that the user asked for."""
    get = partial(get_value, config)
    wanted, epochs, batch = (
        get("trainer.total_training_steps"),
        get("trainer.total_epochs"),
        get("data.train_batch_size"),
    )
    if not wanted or get("data.custom_cls.path"):
        return []
    rows = look_at(get, "data.train_files").rows
    if rows is None or rows < batch:
        return []
    reachable = reachable_steps(rows, batch, epochs)
    return [ends_early(wanted, reachable, epochs, epochs_for(wanted, rows, batch))] if reachable < wanted else []


def look_at(get: Get, key: str) -> Files:
    """Finds and counts the files of ``key``."""
    value = get(key)
    named = [str(f) for f in (value if OmegaConf.is_list(value) or isinstance(value, list) else [value])]
    if value is None:
        return Files(key, problems=(f"{key}: no value; give the path of a parquet file",))
    if any("://" in path for path in named):
        return Files(key)
    problems, paths = [], []
    for path in named:
        found = _matches(path)
        if not found:
            problems.append(_missing(key, path))
        elif not path.endswith(FORMATS):
            problems.append(f"{key}={path}: verl reads {', '.join(FORMATS)} files")
        paths += found
    if problems:
        return Files(key, problems=tuple(problems))
    try:
        counts = [_rows(path) for path in paths]
        columns = [_column_problem(get, key, path) for path in paths]
    except Exception as error:  # pyarrow has a class of its own for each way in which a file can be broken
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Files(key, problems=(f"{key}={value}: it cannot be read: {reason}",))
    known = [count for count in counts if count is not None]
    rows = sum(known) if len(known) == len(counts) else None
    most = get(f"data.{'train' if key == 'data.train_files' else 'val'}_max_samples") or -1
    if rows is not None and most > 0:
        rows = min(rows, most)
    return Files(key, tuple(paths), rows, tuple(p for p in columns if p))


def _matches(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return sorted(glob.glob(path)) if glob.has_magic(path) else []


def _missing(key: str, path: str) -> str:
    if path.startswith("~") and _matches(os.path.expanduser(path)):
        return f"{key}={path}: verl does not expand ~; write {os.path.expanduser(path)}"
    here = "" if os.path.isabs(path) or path.startswith("~") else f" in {os.getcwd()}"
    fix = "; `python -m qerl_verl.data.gsm8k --out data/gsm8k` makes GSM8K's" if "gsm8k" in path else ""
    return f"{key}={path}: there is no such file{here}; give the path of a parquet file{fix}"


def _rows(path: str) -> int | None:
    if path.endswith(".parquet"):
        from pyarrow.parquet import read_metadata

        return read_metadata(path).num_rows
    if path.endswith(".jsonl"):
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    return None


def _column_problem(get: Get, key: str, path: str) -> str | None:
    """Returns the problem of a missing column that verl reads from every row. Without the column of
    the prompts, verl drops every row under ``filter_overlong_prompts`` and reports nothing.
    """
    if not path.endswith(".parquet"):
        return None
    from pyarrow.parquet import read_schema

    columns = read_schema(path).names
    wanted = {get("data.prompt_key") or "prompt": "data.prompt_key names another one"}
    if get("reward.reward_manager.source") == "register":
        wanted |= {name: "verl's reward managers read it" for name in ("data_source", "reward_model")}
    missing = [f"{name} ({why})" for name, why in wanted.items() if name not in columns]
    return (
        f"{key}={path}: no column {' and no column '.join(missing)}; it has {', '.join(columns)}" if missing else None
    )
