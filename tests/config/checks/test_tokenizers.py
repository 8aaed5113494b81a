"""A model's tokenizer is loaded before anything is started."""

import json
import shutil

import pytest
from omegaconf import OmegaConf

from qerl_verl.config.checks import tokenizers


def copy(bf16_checkpoint, folder, *names):
    folder.mkdir()
    for name in ("config.json", *names):
        shutil.copy(bf16_checkpoint / name, folder)
    return folder


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def problems(path, **model):
    model = {"path": str(path), "tokenizer_path": None, "trust_remote_code": False, **model}
    config = {"actor_rollout_ref": {"model": model}, "critic": {"enable": True, "model": {"path": str(path)}}}
    return tokenizers.find_problems(OmegaConf.create(config))


CONFIG = "tokenizer_config.json"
TABLE = {
    "whole": (["tokenizer.json", CONFIG], {}, None),
    "nothing": ([], {}, "no tokenizer in this folder. Put the tokenizer's files there"),
    "its configuration alone": ([CONFIG], {}, "no tokenizer in this folder"),
    "broken": ([CONFIG], {"tokenizer.json": '{"made": "up"}'}, "no tokenizer can be loaded from this folder"),
    "empty": ([CONFIG], {"tokenizer.json": ""}, "no tokenizer can be loaded from this folder"),
}
"""Files of the folder, what others hold, and what the message says."""


@pytest.mark.parametrize("names, others, expected", TABLE.values(), ids=TABLE)
def test_a_folder_without_a_tokenizer_is_refused(bf16_checkpoint, tmp_path, names, others, expected):
    folder = copy(bf16_checkpoint, tmp_path / "model", *names)
    for name, text in others.items():
        (folder / name).write_text(text)
    found = problems(folder)
    assert len(found) == (0 if expected is None else 1)  # one folder is looked at once
    assert all(p.startswith(f"actor_rollout_ref.model.path={folder}: {expected}") for p in found)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
def test_of_every_family(bf16_checkpoint, tmp_path, model_type):
    folder = copy(bf16_checkpoint, tmp_path / "model")
    edit(folder / "config.json", model_type=model_type)
    (problem,) = problems(folder)
    assert "no tokenizer" in problem and "tokenizer.json" in problem


def test_another_folder_may_hold_it(bf16_checkpoint, tmp_path):
    folder = copy(bf16_checkpoint, tmp_path / "model")
    # the critic's is still missing
    (problem,) = problems(folder, tokenizer_path=str(bf16_checkpoint))
    assert problem.startswith(f"critic.model.path={folder}: no tokenizer")


def test_a_token_that_the_model_has_no_embedding_for(bf16_checkpoint, tmp_path):
    folder = copy(bf16_checkpoint, tmp_path / "model", "tokenizer.json", CONFIG)
    edit(folder / "config.json", vocab_size=2)
    (problem,) = problems(folder)
    assert "the tokenizer's eos_token <|im_end|> is number 2, but the model has 2 embeddings" in problem


def test_a_tokenizer_that_ends_no_response(bf16_checkpoint, tmp_path):
    folder = copy(bf16_checkpoint, tmp_path / "model", "tokenizer.json", CONFIG)
    edit(folder / CONFIG, eos_token=None)
    (problem,) = problems(folder)
    assert "has no eos_token" in problem
