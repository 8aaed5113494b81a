"""Dotted keys, and who wrote them."""

import shutil
from pathlib import Path

import pytest
import verl

from qerl_verl.cli.explain import compose_with_keys
from qerl_verl.config.keys import flatten, override_keys

HEAD = "defaults: [ppo_trainer, {qerl: nvfp4}, _self_]\nhydra: {searchpath: ['pkg://verl.trainer.config']}\n"
VERL_CONFIG = Path(verl.__file__).parent / "trainer" / "config"


def test_keys_of_overrides():
    assert override_keys(["+a.b=1", "++c=2", "~d", "e.f='x=y'"]) == {"a.b", "c", "d", "e.f"}


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


@pytest.mark.parametrize(
    ("files", "overrides", "expected"),
    [
        # a recipe's own values, also where they are verl's
        ({"mine.yaml": HEAD + "algorithm: {rollout_correction: {rollout_is: null}}"}, [],
         {"algorithm.rollout_correction.rollout_is"}),
        # a group that is empty sets nothing
        ({"mine.yaml": HEAD + "actor_rollout_ref: {rollout: {engine_kwargs: {vllm: {}}}, model: {lora_alpha: 16}}"}, [],
         {"actor_rollout_ref.model.lora_alpha"}),
        # what the recipe takes in, below the package that it has there
        ({"mine.yaml": HEAD.replace("_self_", "shared@actor_rollout_ref.model, _self_"), "shared.yaml": "lora_rank: 0"}, [],
         {"actor_rollout_ref.model.lora_rank"}),
        ({"mine.yaml": HEAD.replace("_self_", "_self_, extra/a"), "extra/a.yaml": "# @package _global_\ndata: {seed: 1}"}, [],
         {"data.seed"}),
        # the command line, and a choice of one of verl's own files on it
        ({"mine.yaml": HEAD}, ["trainer.nnodes=1", "model_engine=dp"], {"trainer.nnodes", "model_engine"}),
        # a group of the user's that is chosen on the command line
        ({"mine.yaml": HEAD, "run/small.yaml": "# @package _global_\ntrainer: {n_gpus_per_node: 8}"}, ["+run=small"],
         {"run", "trainer.n_gpus_per_node"}),
    ],
)  # fmt: skip
def test_keys_that_the_user_wrote(tmp_path, files, overrides, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    config, keys = compose_with_keys("mine", overrides, str(tmp_path))
    assert keys == expected and "hydra" not in config


def test_of_a_copy_of_verls_files_the_changes_count(tmp_path):
    shutil.copytree(VERL_CONFIG, tmp_path / "config")
    for name, before, after in (
        ("ppo_trainer.yaml", "total_epochs: 30", "total_epochs: 3"),
        ("model/hf_model.yaml", "lora_rank: 0", "lora_rank: 8"),
    ):
        text = (tmp_path / "config" / name).read_text()
        assert before in text
        (tmp_path / "config" / name).write_text(text.replace(before, after))
    _, keys = compose_with_keys("ppo_trainer", ["+qerl=nvfp4"], str(tmp_path / "config"))
    assert keys == {"qerl", "trainer.total_epochs", "actor_rollout_ref.model.lora_rank", "critic.model.lora_rank"}


def test_qerls_recipes_are_recipes_and_the_switch_itself_is_none():
    _, keys = compose_with_keys("quickstart_cpu", [])
    assert {"trainer.total_epochs", "data.train_batch_size"} <= keys
    assert "qerl.aqn.num_stages" in keys and "qerl.platform" not in keys
