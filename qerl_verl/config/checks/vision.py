"""What a model with a vision tower needs beside what every model needs: packages, a processor, and rows
that verl and the installed transformers can compute."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
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
"""verl 0.9.1 runs the tower on a blank image where a micro-batch has none, and takes what transformers 5
returns for a tensor (verl/models/transformers/qwen2_vl.py, _get_input_embeds)."""

FLASH_ATTENTION_FOR_PACKED_ROWS = ("Qwen2_5_VLForConditionalGeneration",)
"""verl/models/transformers/monkey_patch.py, apply_monkey_patch. The engine of packed bases leaves that out
(engine/fsdp.py, _patch_forward)."""

INTERLEAVED = ("Qwen3VLForConditionalGeneration",)
"""Models in which transformers interleaves the frequencies of an image's time, height and width."""


def find_problems(config: DictConfig, folder: Path) -> list[str]:
    """What keeps a local model with a vision tower from running, one sentence each; none for other models.

    Args:
        config: the configuration after :func:`~qerl_verl.config.rules.apply_rules`.
        folder: the actor's model.

    Raises:
        CheckpointError: its config.json cannot be read, or is of a model that is not supported.
    """
    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.checkpoint import read_config

    content = read_config(folder)
    architecture, get = get_architecture(content), partial(get_value, config)
    if not architecture.vision:
        return []
    where = f"{MODEL}.path={folder}"
    found = [
        f"{where}: {architecture.name} needs {name}: {why}"
        for name, why in PACKAGES.items()
        if importlib.util.find_spec(name) is None
    ]
    if not found and (reason := _processor_problem(get, folder)):
        found.append(
            f"{where}: no image processor can be loaded from this folder ({reason}), and verl would go on without images. "
            "Put the processor's files there (processor_config.json, or preprocessor_config.json)"
        )
    rope = _rope(content)
    if (kind := rope.get("rope_type") or rope.get("type") or "default") not in ("default", "mrope"):
        found.append(
            f"{where}: rope_type {kind} in config.json: with images, transformers' and vLLM's positions have been compared "
            "for rope_type default alone. Set default there"
        )
    interleaved = architecture.name in INTERLEAVED
    if bool(rope.get("mrope_interleaved")) != interleaved:
        found.append(
            f"{where}: mrope_interleaved {rope.get('mrope_interleaved')} in config.json: vLLM goes by it, and transformers' "
            f"{architecture.name} computes as with {interleaved}. Set {str(interleaved).lower()} there"
        )
    divided = get(f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size") or 1
    divided = max(divided, get(f"{ACTOR}.ulysses_sequence_parallel_size") or 1)
    if divided > 1:
        found.append(
            f"{ACTOR}.ulysses_sequence_parallel_size={divided}: sequence parallelism has not been tried with images; set it to 1"
        )
    found += _arm_problems(get, architecture.name)
    if architecture.name in ALL_ROWS_NEED_IMAGES and (row := _first_without_image(get)):
        found.append(
            f"data.train_files={get('data.train_files')}: {row}. Stock verl 0.9.1 with transformers 5 ends at a micro-batch "
            f"without images ('BaseModelOutputWithPooling' object has no attribute 'mean'): leave such rows out for "
            f"{architecture.name}, or name their column with data.image_key"
        )
    return found


def _arm_problems(get: Get, name: str) -> list[str]:
    """What the arms cannot do whose actor is built by verl or transformers."""
    arm, attention = get("qerl.arm"), get(f"{MODEL}.override_config.attn_implementation") or "flash_attention_2"
    if arm == "nf4":
        return [f"+qerl=nf4 with {name}: bitsandbytes would quantize the vision tower too; use +qerl=nvfp4 or bf16"]
    packed = get(f"{MODEL}.use_remove_padding") and not attention.startswith("flash_attention")
    if arm == "bf16" and packed and name in FLASH_ATTENTION_FOR_PACKED_ROWS:
        return [
            f"{MODEL}.use_remove_padding=True with +qerl=bf16: verl gives {name} flash-attn for packed rows whatever "
            f"attn_implementation is ({attention}); set use_remove_padding=False, or install flash-attn"
        ]
    return []


def _processor_problem(get: Get, folder: Path) -> str | None:
    """Why verl would have no processor (verl/utils/tokenizer/tokenizer.py, hf_processor)."""
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


def _first_without_image(get: Get) -> str | None:
    """Says which row of the training data has no image; None where all have one, or nobody can tell."""
    train = look_at(get, "data.train_files")
    if get("data.custom_cls.path") or not train.paths or not all(path.endswith(".parquet") for path in train.paths):
        return None
    from pyarrow.parquet import read_schema

    columns = [get("data.image_key") or "images", get("data.video_key") or "videos"]
    for path in train.paths:
        present = [column for column in columns if column in read_schema(path).names]
        if not present:
            return f"{path} has no column {columns[0]}"
        for number, row in enumerate(_rows(path, present)):
            if not any(row):
                return f"row {number} of {path} has nothing in {' and '.join(present)}"
    return None


def _rows(path: str, columns: list[str]) -> Iterator[tuple[int, ...]]:
    """How many images and videos each row has. The images themselves are not decoded."""
    import pyarrow.compute as pc
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches(batch_size=256, columns=columns):
        lengths = [pc.list_value_length(batch.column(i)).to_pylist() for i in range(batch.num_columns)]
        yield from (tuple(length or 0 for length in row) for row in zip(*lengths, strict=True))
