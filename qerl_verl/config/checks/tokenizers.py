"""Checks of the tokenizer of each trained model, loaded as verl will load it in every process."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from qerl_verl.config.keys import get_value
from qerl_verl.config.rules import trained_models


def find_problems(config: DictConfig) -> list[str]:
    """Returns why the tokenizers in local folders cannot be used, one sentence each."""
    out: dict[str, str] = {}
    for model in trained_models(config):
        key = f"{model}.tokenizer_path" if get_value(config, f"{model}.tokenizer_path") else f"{model}.path"
        path = get_value(config, key)
        if not isinstance(path, str) or path in out or not (folder := Path(os.path.expanduser(path))).is_dir():
            continue  # a name on the hub, or a folder of a remote file system
        out[path] = folder_problem(folder, f"{key}={path}", bool(get_value(config, f"{model}.trust_remote_code")))
    return [problem for problem in out.values() if problem]


def folder_problem(folder: Path, where: str, trust_remote_code: bool = False) -> str:
    """Returns why the tokenizer of a model's folder cannot be used, in one sentence; empty if it
    can.

    Args:
        where: the name of the folder with which the sentence begins.
    """
    from transformers import AutoConfig, AutoTokenizer

    fix = "Put the tokenizer's files there (tokenizer.json, tokenizer_config.json), or set tokenizer_path"
    arguments = {"trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **arguments)
        has_config = (folder / "config.json").is_file()
        config = AutoConfig.from_pretrained(folder, **arguments).get_text_config() if has_config else None
        rows = getattr(config, "vocab_size", None)
    except Exception as error:  # whatever transformers makes of what is there
        return f"{where}: no tokenizer can be loaded from this folder ({' '.join(str(error).split())[:200]}). {fix}"
    words = tokenizer.get_vocab().keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if not words:  # transformers builds one without a vocabulary where there are no files
        return f"{where}: no tokenizer in this folder. {fix}"
    if tokenizer.eos_token_id is None:
        return f"{where}: the tokenizer has no eos_token, so no response would end. Set it in tokenizer_config.json"
    for name in ("bos_token", "eos_token", "pad_token"):
        index = getattr(tokenizer, f"{name}_id")
        if rows is not None and index is not None and index >= rows:
            return (
                f"{where}: the tokenizer's {name} {getattr(tokenizer, name)} is number {index}, "
                f"but the model has {rows} embeddings. Give the tokenizer that belongs to the "
                "model, or one whose tokens it has"
            )
    return ""
