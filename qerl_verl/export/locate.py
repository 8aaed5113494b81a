"""Finds the adapter of a checkpoint and the base that it was trained on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qerl_verl.lora.adapter_files import CONFIG_FILE as ADAPTER_CONFIG
from qerl_verl.nvfp4.cache import default_cache_dir, fingerprint
from qerl_verl.nvfp4.checkpoint_files import CONFIG_FILE
from qerl_verl.nvfp4.errors import CheckpointError

RECORD_FILE = "qerl_checkpoint.json"
"""File that the trainer writes into ``global_step_N``, see :mod:`qerl_verl.trainer.checkpoints`."""


@dataclass(frozen=True)
class Source:
    """The adapter of a checkpoint.

    Attributes:
        adapter: folder with ``adapter_config.json``.
        base_model: the base that the adapter names, or None.
        base_fingerprint: hash of the base that it was trained on, where the checkpoint records it.
    """

    adapter: Path
    base_model: str | None
    base_fingerprint: str | None


def find_adapter(checkpoint: Path) -> Source:
    """Returns the actor's adapter in a checkpoint.

    Args:
        checkpoint: ``global_step_N``, its ``actor`` folder, or the folder of a PEFT adapter.

    Raises:
        CheckpointError: the checkpoint holds no adapter, or its configuration or record is damaged.
    """
    places = (checkpoint, checkpoint / "lora_adapter", checkpoint / "actor" / "lora_adapter")
    adapter = next((place for place in places if (place / ADAPTER_CONFIG).is_file()), None)
    if adapter is None:
        raise CheckpointError(
            f"{checkpoint}: no {ADAPTER_CONFIG} in it, in lora_adapter or in actor/lora_adapter. "
            "Give a global_step_N folder of a run, or the folder of a PEFT adapter."
        )
    base_model = _read_object(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    record = next((p / RECORD_FILE for p in (adapter, *adapter.parents[:2]) if (p / RECORD_FILE).is_file()), None)
    recorded = None if record is None else _read_object(record).get("base", {}).get("actor")
    # a model that is used as it is has the arm's name before the hash (config/replace_models.py,
    # replace_models)
    if recorded:
        recorded = recorded.rpartition("-")[2]
    return Source(adapter, base_model, recorded)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); save or fetch it again") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object; save or fetch it again")
    return content


def find_base(source: Source, wanted: Path | None = None, cache_dir: Path | None = None) -> Path:
    """Returns the folder of the base that an adapter was trained on.

    Args:
        source: from :func:`find_adapter`.
        wanted: a folder that the user names. It is refused if the checkpoint records another base.
        cache_dir: cache of quantized checkpoints, which is searched for the recorded base.

    Raises:
        CheckpointError: the base is not found, or is not the recorded one.
    """
    recorded, cache = source.base_fingerprint, cache_dir or default_cache_dir()
    if wanted is not None:
        if not (wanted / CONFIG_FILE).is_file():
            raise CheckpointError(f"--base {wanted}: no {CONFIG_FILE} there. Give the folder of a model.")
        if recorded and fingerprint(wanted, cache) != recorded:
            raise CheckpointError(
                f"--base {wanted}: its weights are not those that {source.adapter} was trained on "
                f"(fingerprint {recorded} in the checkpoint). Leave --base out to look for them in "
                "the cache."
            )
        return wanted
    named = Path(source.base_model).expanduser() if source.base_model else None
    candidates = [named] if named is not None and (named / CONFIG_FILE).is_file() else []
    if recorded is None:
        if candidates:
            return candidates[0]
        raise CheckpointError(
            f"{source.adapter}: its base, {source.base_model}, is no folder here. Give the model that it was trained on with --base."
        )
    candidates += sorted(p.parent for p in cache.glob(f"*/{CONFIG_FILE}"))
    for folder in candidates:
        if fingerprint(folder, cache) == recorded:
            return folder
    raise CheckpointError(
        f"{source.adapter}: the base that it was trained on (fingerprint {recorded}) is neither "
        f"{source.base_model} nor in the cache {cache}. Give its folder with --base, or the cache "
        "of the run with --cache-dir."
    )
