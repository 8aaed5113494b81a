"""Provides tiny checkpoints of every supported architecture, written by transformers."""

import shutil

import pytest
import torch

from qerl_verl.nvfp4.architectures import automatic_class, get_architecture
from tests.helpers.tiny_families import make_config


@pytest.fixture(scope="session")
def _built(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints"), {}


@pytest.fixture
def make_checkpoint(_built, tmp_path):
    """Returns ``make_checkpoint(architecture, name="src", dtype=..., shards=False, **config)``.

    Each call returns a fresh copy of the folder.
    """
    root, cache = _built

    def make(architecture="Qwen2ForCausalLM", name="src", *, dtype=torch.bfloat16, shards=False, **kwargs):
        key = repr((architecture, dtype, shards, sorted(kwargs.items())))
        if key not in cache:
            torch.manual_seed(len(architecture))
            config = make_config(architecture, **kwargs)
            model = automatic_class(get_architecture(config)).from_config(config, dtype=dtype)
            # including norms and biases, so no two tensors are alike
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
            cache[key] = root / str(len(cache))
            model.save_pretrained(cache[key], max_shard_size="10KB" if shards else "5GB")
            (cache[key] / "tokenizer.json").write_text('{"made": "up"}')
            (cache[key] / "chat_template.jinja").write_text("{{ messages }}\n")
        return shutil.copytree(cache[key], tmp_path / name)

    return make
