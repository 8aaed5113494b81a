"""Provides adapters, data and an engine without vLLM."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from qerl_verl.data.prompts import prompt_row
from qerl_verl.lora.peft import save_adapter
from qerl_verl.nvfp4.model_shapes import adaptable_shapes


@pytest.fixture(scope="session")
def write_adapter(bf16_checkpoint):
    """Returns ``write_adapter(folder, rank=8, alpha=16, seed=1, rename=None, settings=None)``.

    It writes an adapter for the tiny model. ``rename`` is applied to each tensor's name and may
    return None to omit the tensor; ``settings`` overwrite adapter_config.json.
    """
    shapes = adaptable_shapes(bf16_checkpoint)

    def write(folder, rank=8, alpha=16, seed=1, rename=None, settings=None, shapes=shapes):
        torch.manual_seed(seed)
        tensors = {}
        for name, (rows, columns) in shapes.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns) * 0.2
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank) * 0.2
        targets = sorted({name.rpartition(".")[2] for name in shapes})
        config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, target_modules=targets)
        save_adapter(folder, tensors, config, str(bf16_checkpoint))
        if rename:
            file = folder / "adapter_model.safetensors"
            save_file({new: t for name, t in load_file(file).items() if (new := rename(name))}, file)
        if settings:
            file = folder / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        return folder

    return write


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Returns a data set of six sums."""
    file = tmp_path_factory.mktemp("data") / "digits.jsonl"
    rows = [prompt_row("digits", f"{i}+{i}=", str(2 * i), index=i) for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
