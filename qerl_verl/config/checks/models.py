"""Model folders on this machine. A name on the hub is looked at when it has been downloaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from omegaconf import DictConfig

from qerl_verl.config.arms import get_arm
from qerl_verl.config.keys import get_value
from qerl_verl.config.rules import MODEL, trained_models


def local_folder(config: DictConfig, model: str) -> Path | None:
    """The folder of a model, None where its path is a name on the hub or a remote file system's."""
    path = get_value(config, f"{model}.path")
    if not isinstance(path, str) or "://" in path:
        return None
    folder = Path(os.path.expanduser(path))
    return folder if folder.is_dir() else None


def find_problems(config: DictConfig) -> list[str]:
    """What keeps the local models of a run from being quantized or used, one sentence each."""
    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.checkpoint import (
        check_source,
        read_config,
        read_headers,
        read_quantization,
        validate_nvfp4_checkpoint,
    )
    from qerl_verl.nvfp4.errors import CheckpointError

    out = []
    for model in trained_models(config):
        folder = local_folder(config, model)
        if folder is None:
            continue
        try:
            if not get_arm(config).container:
                check_source(folder)
            elif read_quantization(folder) == "nvfp4":
                validate_nvfp4_checkpoint(folder)
            else:
                get_architecture(read_config(folder))
                read_headers(folder)
        except CheckpointError as error:
            out.append(f"{model}.path={get_value(config, f'{model}.path')}: {error}")
    return out + fused_kernel_problems(config)


def fused_kernel_problems(config: DictConfig) -> list[str]:
    """verl shards an output layer that is not tied by itself under FSDP2 (verl/utils/fsdp_utils.py,
    _select_fsdp2_wrap_targets), and its fused kernels read that weight without gathering it (models/transformers/
    dense_common.py): the first forward pass fails, in stock verl too."""
    folder = local_folder(config, MODEL)
    if not get_value(config, f"{MODEL}.use_fused_kernels") or folder is None or not (folder / "config.json").is_file():
        return []
    if json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", False):
        return []
    return [
        f"{MODEL}.use_fused_kernels=True: verl 0.9 cannot run its fused kernels under FSDP2 on a model whose output layer "
        "is not tied to the embeddings; remove the setting"
    ]
