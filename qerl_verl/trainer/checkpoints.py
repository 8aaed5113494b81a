"""Tells complete from incomplete checkpoints, and finds the folder that a run may resume from.

verl writes ``global_step_N/`` file by file and then overwrites
``latest_checkpointed_iteration.txt`` in place (verl/trainer/ppo/v1/trainer_base.py,
_save_checkpoint). A run that dies in between leaves a folder that looks like a checkpoint, or an
empty tracker. As the last file the trainer therefore writes ``qerl_checkpoint.json`` into the
folder: name and size of each file, the base that the adapter was trained on, and the other settings
that define the policy. ``resume_mode=auto`` ignores a folder without this record, or one that does
not match it.

As the first file it writes ``qerl_run``, the identifier of the run, which a restart with
``resume_mode=auto`` continues. Only folders with this run's identifier are pruned, and in them only
files that the record lists. A checkpoint of another run that stands in the place of a new one moves
aside. ``qerl_owner.json`` in ``trainer.default_local_dir`` names the process that saves there,
since two runs that save at the same time would mix their files in one folder."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from verl.utils.checkpoint.checkpoint_manager import get_checkpoint_tracker_filename

from qerl_verl.config.policy import find_changes
from qerl_verl.config.rules import MODEL
from qerl_verl.file_sizes import find_differences
from qerl_verl.json_files import write_json_atomically
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.ownership import Owner

RECORD_FILE = "qerl_checkpoint.json"
PRUNED_FILE = "qerl_checkpoint.pruned.json"
"""The record of a checkpoint from which :func:`prune` has removed files."""
RUN_FILE = "qerl_run"
OWNER_FILE = "qerl_owner.json"
OWNER_SECONDS = 30.0
"""How long a new run waits for the end of another one, whose driver may have been killed just
now."""
_OURS = (RECORD_FILE, PRUNED_FILE, RUN_FILE)
_PREFIX = "global_step_"


def take_folder(root: Path, notify: Callable[[str], None]) -> None:
    """Records this process as the one that saves in ``trainer.default_local_dir``.

    Args:
        root: the folder; it is made if it is missing.
        notify: called with one line where a process of another host saved there last, or where one
            of this host is waited for.

    Raises:
        CheckpointError: another process of this host saves there, and goes on.
        OSError: the folder cannot be written to.
    """
    file, here, end = root / OWNER_FILE, Owner.current(), time.monotonic() + OWNER_SECONDS
    owner = Owner.read(file)
    if owner is not None and owner != here:
        if owner.state() == "alive":
            notify(f"{owner} saves in {root} as well; waiting up to {OWNER_SECONDS:.0f} s for its end")
        elif owner.host != here.host:
            notify(
                f"{owner} was the last that saved in {root}; a run that still trains there needs a folder of its own"
            )
        while owner.state() == "alive":
            if time.monotonic() > end:
                raise CheckpointError(
                    f"trainer.default_local_dir={root}: {owner} saves its checkpoints there now. "
                    "Give this run another folder, or end that one. Nothing was changed."
                )
            time.sleep(0.2)
    root.mkdir(parents=True, exist_ok=True)
    here.write(file)


def write_record(
    folder: str | Path, base: dict[str, str], policy: dict[str, Any] | None = None, steps: int | None = None
) -> None:
    """Declares a checkpoint complete. All of its files are on the disk when the function returns.

    Args:
        folder: ``global_step_N``.
        base: role -> fingerprint of the NVFP4 base, see :func:`qerl_verl.nvfp4.cache.fingerprint`.
        policy: the other settings that define the policy, see
            :func:`qerl_verl.config.policy.describe_policy`.
        steps: number of steps of the whole run, over which the noise schedule stretches.
    """
    folder = Path(folder)
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in _OURS}
    for path in files.values():
        _sync(path)
    record = {"base": base, "policy": policy or {}, "total_training_steps": steps}
    record |= {"files": {name: path.stat().st_size for name, path in files.items()}}
    write_json_atomically(folder / RECORD_FILE, record, sync=True)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_record(folder: str | Path, file: str = RECORD_FILE) -> dict | None:
    """Returns the record of a checkpoint, or None if it has no readable one."""
    try:
        record = json.loads((Path(folder) / file).read_text())
        return record if isinstance(record["files"], dict) and isinstance(record["base"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_damage(folder: str | Path) -> str | None:
    """Returns why a checkpoint is incomplete, or None if it is complete. Compares sizes, not
    contents.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    record = read_record(folder)
    if record is None and read_record(folder, PRUNED_FILE):
        return "files of it were removed, since trainer.max_actor_ckpt_to_keep or max_critic_ckpt_to_keep newer ones were saved"
    if record is None:
        return f"{RECORD_FILE}, which is written last, is missing or unreadable"
    compared = find_differences(folder, record["files"])
    return next((f"{name} {difference}" for name, difference in compared if difference), None)


def checkpoint_step(folder: str | Path) -> int:
    return int(Path(folder).name.removeprefix(_PREFIX))


def list_checkpoints(root: str | Path) -> list[Path]:
    """Returns all ``global_step_N`` under ``root``, complete or not, the newest first."""
    root = Path(root)
    found = [p for p in root.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit() and p.is_dir()]
    return sorted(found, key=checkpoint_step, reverse=True)


def find_resumable(root: str | Path, notify) -> Path | None:
    """Returns the checkpoint that ``trainer.resume_mode=auto`` continues from: the one that verl's
    tracker names, or the newest complete one before it.

    Args:
        root: ``trainer.default_local_dir``.
        notify: called with one line for each folder that is skipped.

    Returns:
        A complete ``global_step_N``; None to start from scratch, if no save was ever completed.

    Raises:
        CheckpointError: something was saved, but no checkpoint is complete.
    """
    root = Path(root)
    candidates = list_checkpoints(root)
    tracker = Path(get_checkpoint_tracker_filename(str(root)))
    if not tracker.exists():  # as verl does it
        for folder in candidates:
            notify(f"{folder} is passed over: there is no {tracker.name}, so no save came to its end; from scratch")
        return None
    damage: dict[Path, str] = {}
    text = tracker.read_bytes().decode(errors="replace").strip()
    if text.isdigit():
        named = root / f"{_PREFIX}{int(text)}"
        candidates = [c for c in candidates if checkpoint_step(c) <= int(text)]
        if named not in candidates:
            damage[named] = f"there is no such folder, but {tracker.name} names it"
    else:
        damage[tracker] = f"it should hold a step and holds {text!r}"
    for folder in candidates:
        problem = find_damage(folder)
        if problem is None:
            for other, why in damage.items():
                notify(f"{other} is passed over: {why}")
            return folder
        damage[folder] = problem
    listed = "".join(f"\n  {folder}: {why}" for folder, why in damage.items())
    raise CheckpointError(
        f"no checkpoint in {root} is whole:{listed}\nRestore one of them; or take one as it is "
        "with trainer.resume_mode=resume_path trainer.resume_from_path=FOLDER; or begin anew with "
        "trainer.resume_mode=disable and another trainer.default_local_dir."
    )


def check_policy(folder: str | Path, policy: dict[str, Any]) -> None:
    """Refuses to resume with another policy than the one that was trained, for example with another
    scale of the adapter or other noise.

    Args:
        folder: a checkpoint; settings that it has not recorded are not compared.
        policy: of this run, see :func:`qerl_verl.config.policy.describe_policy`.

    Raises:
        CheckpointError: naming each setting, its value then and now, and the fix.
    """
    record = read_record(folder) or {}
    if changes := find_changes(record.get("policy") or {}, json.loads(json.dumps(policy))):
        raise CheckpointError(
            f"{folder} was saved by a run with another policy: {'; '.join(changes)}. To begin a "
            "new run from its adapter: trainer.resume_mode=disable "
            f"{MODEL}.lora_adapter_path={Path(folder) / 'actor' / 'lora_adapter'} and another "
            "trainer.default_local_dir. Nothing was changed."
        )


def other_length(folder: str | Path, steps: int | None) -> int | None:
    """Returns the number of steps of the run that saved a checkpoint if it differs from ``steps``,
    else None.
    """
    then = (read_record(folder) or {}).get("total_training_steps")
    return then if then is not None and steps is not None and then != steps else None


def check_base(folder: str | Path, base: dict[str, str]) -> None:
    """Refuses to put an adapter on a base that it was not trained on.

    Args:
        folder: a checkpoint; one without a record is accepted.
        base: role -> fingerprint in this run.

    Raises:
        CheckpointError: naming the role.
    """
    record = read_record(folder)
    for role, before in (record or {"base": {}})["base"].items():
        now = base.get(role)
        if now is not None and now != before:
            raise CheckpointError(
                f"{folder}: its {role} was trained on another base than the one that this run "
                f"reads now (fingerprint {before} then, {now} now): the model's files, or how they "
                "are quantized (qerl.quantization), have changed since. Restore that, or begin "
                "anew with trainer.resume_mode=disable and another trainer.default_local_dir; "
                "nothing was changed."
            )


def new_run() -> str:
    """Returns a unique identifier for a run."""
    return uuid.uuid4().hex


def read_run(folder: Path) -> str | None:
    """Returns the identifier of the run that saved a checkpoint, or None if none is recorded."""
    try:
        return (folder / RUN_FILE).read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def claim(folder: Path, run: str, notify: Callable[[str], None]) -> None:
    """Marks ``global_step_N`` as this run's before the run saves there. A complete checkpoint of
    another run, or a folder that QeRL did not write, moves aside.

    An incomplete save of QeRL, of whichever run, is overwritten.

    Args:
        notify: called with one line for a folder that moves.
    """
    owner = read_run(folder)
    if (
        owner != run
        and folder.is_dir()
        and any(folder.iterdir())
        and (owner is None or (folder / RECORD_FILE).exists())
    ):
        aside = folder.with_name(f"{folder.name}.aside-{uuid.uuid4().hex[:8]}")
        folder.rename(aside)
        notify(f"{folder} holds a checkpoint of another run; it is {aside.name} from now on")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD_FILE).unlink(missing_ok=True)  # this run may have saved this step before
    (folder / RUN_FILE).write_text(run)


def prune(saved: list[Path], role: str, keep: int | None, run: str) -> None:
    """Removes ``role``'s files from old checkpoints, as verl does, but only after the newest
    checkpoint is complete.

    Only files that ``run`` wrote are removed: those that the record lists, in folders with the
    run's identifier.

    Args:
        saved: the checkpoints of this run in the order of their steps, the newest last.
        role: actor or critic.
        keep: ``trainer.max_{role}_ckpt_to_keep``; None keeps all.
        run: see :func:`claim`.

    Raises:
        OSError: a file cannot be removed.
    """
    if not keep or keep < 0:
        return
    for folder in saved[:-keep]:
        if read_run(folder) != run:
            continue
        with suppress(FileNotFoundError):  # another role's part has gone before
            # first: the folder is not whole any more
            (folder / RECORD_FILE).rename(folder / PRUNED_FILE)
        for name in (read_record(folder, PRUNED_FILE) or {"files": ()})["files"]:
            if name.startswith(f"{role}/"):
                (folder / name).unlink(missing_ok=True)
        for place in sorted((folder / role).rglob("*"), reverse=True) + [folder / role]:
            if place.is_dir() and not place.is_symlink() and not any(place.iterdir()):
                place.rmdir()
