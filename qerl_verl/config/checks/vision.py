"""Checks of what a model with a vision tower needs beside what every model needs: packages, a
processor, and rows that verl and the installed transformers can process.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from qerl_verl.config.checks.data import look_at
from qerl_verl.config.keys import Get, get_value
from qerl_verl.config.rules import ACTOR, MODEL

PACKAGES = {
    "torchvision": "vLLM and transformers read images and videos with it; install the build that fits PyTorch",
    "qwen_vl_utils": "verl's data sets read images with it; pip install qwen-vl-utils",
}
"""What has to be importable, and why."""

ALL_ROWS_NEED_IMAGES = ("Qwen2_5_VLForConditionalGeneration",)
"""verl 0.9.1 runs the tower on a blank image where a micro-batch has none, and takes what
transformers 5 returns for a tensor (verl/models/transformers/qwen2_vl.py, _get_input_embeds)."""
LOOKED_AT = 2000
"""Rows of the training data whose images are counted. They are read with their bytes."""

FLASH_ATTENTION_ALONE = ("Qwen2_5_VLForConditionalGeneration",)
"""verl/models/transformers/monkey_patch.py, apply_monkey_patch. The engine of packed bases leaves
that out (engine/adapter.py, _patch_forward)."""

INTERLEAVED = ("Qwen3VLForConditionalGeneration",)
"""Models in which transformers interleaves the frequencies of an image's time, height and width."""


def find_problems(config: DictConfig, folder: Path) -> list[str]:
    """Returns why a local model cannot run on images, or on data with images, one sentence each.

    Args:
        config: the configuration after the rules (:mod:`qerl_verl.config.rules`).
        folder: the actor's model.

    Raises:
        CheckpointError: its config.json cannot be read, or is that of an unsupported model.
    """
    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.checkpoint_files import read_config

    content = read_config(folder)
    architecture, get = get_architecture(content), partial(get_value, config)
    if not architecture.vision:
        return [problem] if (problem := _row_problem(get, architecture.name, tower=False)) else []
    where = f"{MODEL}.path={folder}"
    found = [f"{where}: {architecture.name} needs {name}: {PACKAGES[name]}" for name in missing_packages()]
    if not found and (reason := _processor_problem(get, folder)):
        found.append(
            f"{where}: no image processor can be loaded from this folder ({reason}), and verl "
            "would go on without images. Put the processor's files there (processor_config.json, "
            "or preprocessor_config.json)"
        )
    rope = _rope(content)
    if (kind := rope.get("rope_type") or rope.get("type") or "default") not in ("default", "mrope"):
        found.append(
            f"{where}: rope_type {kind} in config.json: with images, transformers' and vLLM's "
            "positions have been compared for rope_type default alone. Set default there"
        )
    interleaved = architecture.name in INTERLEAVED
    if bool(rope.get("mrope_interleaved")) != interleaved:
        found.append(
            f"{where}: mrope_interleaved {rope.get('mrope_interleaved')} in config.json: vLLM goes "
            f"by it, and transformers' {architecture.name} computes as with {interleaved}. Set "
            f"{str(interleaved).lower()} there"
        )
    found += _arm_problems(get, architecture.name)
    if problem := _row_problem(get, architecture.name):
        found.append(problem)
    return found


def missing_packages() -> list[str]:
    """Returns those of :data:`PACKAGES` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def _arm_problems(get: Get, name: str) -> list[str]:
    """Returns what the arms cannot do whose actor is built by verl or transformers, and what no arm
    can do without flash-attn.
    """
    arm, attention = get("qerl.arm"), get(f"{MODEL}.override_config.attn_implementation") or "flash_attention_2"
    if arm == "nf4":
        return [f"+qerl=nf4 with {name}: bitsandbytes would quantize the vision tower too; use +qerl=nvfp4 or bf16"]
    if name not in FLASH_ATTENTION_ALONE or attention.startswith("flash_attention"):
        return []
    divided = get(f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size") or 1
    divided = max(divided, get(f"{ACTOR}.ulysses_sequence_parallel_size") or 1)
    why = f"verl gives {name} flash-attn for it whatever attn_implementation is ({attention})"
    if divided > 1:
        return [f"{ACTOR}.ulysses_sequence_parallel_size={divided}: {why}; set it to 1, or install flash-attn"]
    if arm == "bf16" and get(f"{MODEL}.use_remove_padding"):
        return [f"{MODEL}.use_remove_padding=True with +qerl=bf16: {why}; set it to False, or install flash-attn"]
    return []


def _processor_problem(get: Get, folder: Path) -> str | None:
    """Returns why verl would have no processor (verl/utils/tokenizer/tokenizer.py,
    hf_processor)."""
    from transformers import AutoProcessor, PreTrainedTokenizerBase

    path = get(f"{MODEL}.tokenizer_path") or str(folder)
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=bool(get(f"{MODEL}.trust_remote_code")))
    except Exception as error:  # whatever transformers makes of what is there
        return " ".join(str(error).split())[:200]
    return "only a tokenizer is there" if isinstance(processor, PreTrainedTokenizerBase) else None


def _rope(content: dict[str, Any]) -> dict[str, Any]:
    from qerl_verl.nvfp4.architectures import text_settings

    settings = text_settings(content)
    return settings.get("rope_parameters") or settings.get("rope_scaling") or {}


def _row_problem(get: Get, name: str, tower: bool = True) -> str | None:
    """Returns the problem of the first row of the training data, among :data:`LOOKED_AT` rows,
    whose images and prompt do not match.

    Args:
        name: name of the architecture.
        tower: whether the model has a vision tower.
    """
    from pyarrow.parquet import read_schema

    train = look_at(get, "data.train_files")
    if get("data.custom_cls.path") or not train.paths or not all(path.endswith(".parquet") for path in train.paths):
        return None
    where, image_key = f"data.train_files={get('data.train_files')}", get("data.image_key") or "images"
    columns = [image_key, get("data.video_key") or "videos"]
    if not tower and not any(column in read_schema(path).names for path in train.paths for column in columns):
        return None
    for place, marks, counts in islice(_rows(train.paths, get("data.prompt_key") or "prompt", columns), LOOKED_AT):
        if not tower and any(counts):
            return (
                f"{where}: {place} has images or videos ({' and '.join(columns)}), and {name} has "
                "no vision tower; take a model with one, or name other columns with "
                "data.image_key and data.video_key"
            )
        if tower and marks and not any(counts):
            return (
                f"{where}: {place} has <image> in its prompt and nothing in the column "
                f"{image_key}, so the model would be asked without the image; name the column with "
                "data.image_key"
            )
        if tower and counts[0] != marks and any(counts):
            return (
                f"{where}: {place} has <image> {marks} times in its prompt and {counts[0]} images; verl wants as many"
            )
        if name in ALL_ROWS_NEED_IMAGES and not any(counts):
            return (
                f"{where}: {place} has no image. Stock verl 0.9.1 with transformers 5 ends at a "
                "micro-batch without images ('BaseModelOutputWithPooling' object has no attribute "
                f"'mean'): leave such rows out for {name}"
            )
    return None


def _rows(paths: Iterable[str], prompt: str, columns: list[str]) -> Iterator[tuple[str, int, list[int]]]:
    """Yields for each row its position, how often ``<image>`` is in its prompt, and the number of
    entries of each column.
    """
    import pyarrow.compute as pc
    from pyarrow.parquet import ParquetFile

    for path in paths:
        file = ParquetFile(path)
        present = set(file.schema_arrow.names)
        if prompt not in present:
            continue
        start = 0
        for batch in file.iter_batches(batch_size=64, columns=[c for c in (prompt, *columns) if c in present]):
            lengths = [
                pc.list_value_length(batch.column(c)).to_pylist() if c in present else [0] * len(batch) for c in columns
            ]
            for index, messages in enumerate(batch.column(prompt).to_pylist()):
                texts = (
                    [m.get("content") for m in messages or () if isinstance(m, dict)] if messages is not None else []
                )
                marks = sum(text.count("<image>") for text in texts if isinstance(text, str))
                yield f"row {start + index} of {path}", marks, [column[index] or 0 for column in lengths]
            start += len(batch)
