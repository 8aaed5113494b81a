"""Checks of the prompts of the training data with the model's tokenizer or processor, before Ray
starts.

verl drops prompts that are longer than ``data.max_prompt_length``, and reports nothing more than a
count. Their tokens are counted here as verl counts them (verl/utils/dataset/rl_dataset.py,
maybe_filter_out_long_prompts): with the chat template and, for a row with images or videos, with
the processor, which replaces the placeholder of an image by as many tokens as the image takes. Tool
schemas are not counted, because loading them runs the user's code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config.checks import vision
from qerl_verl.config.checks.data import Files, look_at
from qerl_verl.config.keys import MODEL, Get, get_value

MOST_ROWS = 20_000
"""Prompts that are looked at, at most, to find a full batch of short ones."""

MOST_MEDIA_ROWS = 2_000
"""The same for data with images or videos, which have to be decoded."""

MEDIA = {"image_key": "images", "video_key": "videos", "audio_key": "audios"}
"""Settings under ``data`` that name a column of media, and verl's defaults."""

Row = Mapping[str, Any]
Count = Callable[[Row], int]
"""Tokens of a row's prompt. Raises whatever the template or the processor raises."""


def find_problems(config: DictConfig, folder: str | os.PathLike) -> list[str]:
    """Returns the problems of a tokenizer without a chat template, and of data with too few short
    prompts for one batch.

    Args:
        config: the configuration after the rules.
        folder: the actor's model, on this machine.
    """
    get = partial(get_value, config)
    if get("data.custom_cls.path") or _has_own_agent_loop(get):
        return []
    tokenizer = _load(get, folder, "AutoTokenizer")
    if tokenizer is None:  # reported by the check of the model's folder
        return []
    custom = get(f"{MODEL}.custom_chat_template")
    if not (custom or tokenizer.chat_template):
        return [
            f"{MODEL}.path={get(f'{MODEL}.path')}: its tokenizer has no chat template, which verl "
            f"makes every prompt with; give one with {MODEL}.custom_chat_template"
        ]
    if custom:
        tokenizer.chat_template = custom
    train = look_at(get, "data.train_files")
    if not train.paths or not all(path.endswith(".parquet") for path in train.paths):
        return []
    media = _media_columns(get, train) if _has_tower(folder) else []
    if not media:
        return _length_problems(get, train, _text_counter(get, tokenizer), media, "the chat template")
    if vision.missing_packages():  # reported with the model
        return []
    processor = _load(get, folder, "AutoProcessor")
    if processor is None or not hasattr(processor, "tokenizer"):  # likewise
        return []
    if custom:
        processor.chat_template = custom
    count = _media_counter(config, tokenizer, processor)
    return _length_problems(get, train, count, media, "the processor")


def _has_own_agent_loop(get: Get) -> bool:
    agent = "actor_rollout_ref.rollout.agent"
    names = ("agent_loop_config_path", "agent_loop_manager_class")
    return any(get(f"{agent}.{name}") for name in names)


def _load(get: Get, folder: str | os.PathLike, auto_class: str) -> Any | None:
    """Returns the run's tokenizer or processor; None if it cannot be loaded."""
    import transformers

    path = get(f"{MODEL}.tokenizer_path") or str(folder)
    trusted = bool(get(f"{MODEL}.trust_remote_code"))
    try:
        return getattr(transformers, auto_class).from_pretrained(path, trust_remote_code=trusted)
    except Exception:  # whatever code of the hub's or a broken file raises
        return None


def _has_tower(folder: str | os.PathLike) -> bool:
    """Returns whether the model processes images."""
    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.checkpoint_files import read_config
    from qerl_verl.nvfp4.errors import CheckpointError

    try:
        return bool(get_architecture(read_config(Path(folder))).vision)
    except CheckpointError:  # reported with the model
        return False


def _media_columns(get: Get, train: Files) -> list[str]:
    """Returns the columns of images, videos and audio that the data has."""
    from pyarrow.parquet import read_schema

    named = [get(f"data.{key}") or default for key, default in MEDIA.items()]
    present = {name for path in train.paths for name in read_schema(path).names}
    return [name for name in named if name in present]


def _template_arguments(get: Get) -> dict[str, Any]:
    """Returns ``data.apply_chat_template_kwargs`` without the arguments that decide the form of the
    result.
    """
    arguments = get("data.apply_chat_template_kwargs")
    arguments = OmegaConf.to_container(arguments, resolve=True) if arguments else {}
    decided = ("tokenize", "return_dict", "return_tensors")
    return {name: value for name, value in arguments.items() if name not in decided}


def _text_counter(get: Get, tokenizer: Any) -> Count:
    column, arguments = get("data.prompt_key") or "prompt", _template_arguments(get)

    def count(row: Row) -> int:
        text = tokenizer.apply_chat_template(row[column], add_generation_prompt=True, tokenize=False, **arguments)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count


def _media_counter(config: DictConfig, tokenizer: Any, processor: Any) -> Count:
    """Returns a counter that uses verl's own data set, without reading its files."""
    from verl.utils.dataset.rl_dataset import RLHFDataset
    from verl.utils.tokenizer import build_multimodal_processor_inputs

    class Unread(RLHFDataset):
        def _read_files_and_tokenize(self):
            pass

    settings = OmegaConf.merge(config.data, {"tool_config_path": None, "function_tool_path": None})
    dataset = Unread([], tokenizer, settings, processor)
    arguments = _template_arguments(partial(get_value, config))

    def count(row: Row) -> int:
        messages = dataset._build_messages(row, key=dataset.prompt_key)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)
        images, videos, audios = dataset._process_multi_modal_info(messages, dataset.image_patch_size, settings)
        if images is None and videos is None and audios is None:
            return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
        inputs = build_multimodal_processor_inputs(
            processor,
            text=[text],
            images=images,
            videos=videos,
            audio=audios,
            mm_processor_kwargs=dataset.mm_processor_kwargs,
        )
        return len(inputs["input_ids"][0])

    return count


def _length_problems(get: Get, train: Files, count: Count, media: list[str], counted_by: str) -> list[str]:
    """Returns the problem of a template or processor that fails on the first prompt, or of too few
    prompts within ``max_prompt_length``. Stops reading at the first full batch.
    """
    longest, batch = get("data.max_prompt_length"), get("data.train_batch_size")
    most = MOST_MEDIA_ROWS if media else MOST_ROWS
    fitting = seen = 0
    for row in _rows(train, [get("data.prompt_key") or "prompt", *media]):
        try:
            fitting += count(row) <= longest
        except Exception as error:  # jinja, a template's own raise_exception, a broken image
            if seen == 0:
                reason = " ".join(str(error).split())[:200]
                return [
                    f"{train.key}={get(train.key)}: {counted_by} of {get(f'{MODEL}.path')} fails "
                    f"on the first prompt: {reason}; change the prompts, or give another template "
                    f"with {MODEL}.custom_chat_template"
                ]
        seen += 1
        if fitting >= batch or seen >= most or not get("data.filter_overlong_prompts"):
            return []
    if not seen:
        return []
    tokens = ", image tokens included" if media else ""
    return [
        f"data.max_prompt_length={longest} with filter_overlong_prompts=True leaves {fitting} of "
        f"{seen} prompts{tokens}, fewer than data.train_batch_size={batch}; raise the length or "
        "lower the batch size"
    ]


def _rows(files: Files, columns: list[str]) -> Iterator[Row]:
    """Yields the first rows of the files, as many as verl takes; a file may lack columns of
    media."""
    from pyarrow.parquet import ParquetFile

    left = files.rows or 0
    for path in files.paths:
        file = ParquetFile(path)
        present = [name for name in columns if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=64, columns=present):
            yield from batch.to_pylist()[:left]
            left -= batch.num_rows
            if left <= 0:
                return
