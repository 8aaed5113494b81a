"""Models of a run and the checkpoints that take their place."""

import pytest
from omegaconf import OmegaConf

from qerl_verl.config import replace_models
from qerl_verl.config.arms import ARMS
from qerl_verl.config.settings import QeRLSettings, SettingsError
from qerl_verl.nvfp4.cache import fingerprint


def models(folder, actor, critic):
    config = {"actor_rollout_ref": {"model": {"path": actor}}, "critic": {"model": {"path": critic}, "enable": True}}
    return OmegaConf.create({**config, "algorithm": {"adv_estimator": "gae"}, "qerl": {"source_models": None}})


@pytest.mark.parametrize("critic", ["same", "${actor_rollout_ref.model.path}", "other"])
def test_one_model_is_one_checkpoint_and_another_is_quantized_too(
    tmp_path, bf16_checkpoint, model_factory, capsys, critic
):
    path = model_factory(tmp_path / "other", num_hidden_layers=1) if critic == "other" else bf16_checkpoint
    config = models(tmp_path, str(bf16_checkpoint), critic if "$" in critic else str(path))
    replace_models.replace_models(config, QeRLSettings(cache_dir=str(tmp_path / "cache")))
    entries = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert len(entries) == (2 if critic == "other" else 1)
    assert (config.actor_rollout_ref.model.path == config.critic.model.path) is (critic != "other")
    sources = {"actor": str(bf16_checkpoint), "critic": str(path)}
    assert config.qerl.source_models == sources
    assert {config.actor_rollout_ref.model.path, config.critic.model.path} == {str(e) for e in entries}
    assert ("critic: a checkpoint of its own" in capsys.readouterr().out) is (critic == "other")
    fingerprints = config.qerl.base_fingerprint
    assert set(fingerprints) == {"actor", "critic"} and (fingerprints.actor == fingerprints.critic) is (
        critic != "other"
    )


def test_a_model_that_cannot_be_had_is_named_with_its_key(tmp_path, bf16_checkpoint):
    config = models(tmp_path, str(bf16_checkpoint), "/nowhere")
    with pytest.raises(SettingsError, match="critic.model.path=/nowhere: .*no such folder"):
        replace_models.replace_models(config, QeRLSettings(cache_dir=str(tmp_path / "cache")))


def actor_alone(path, arm):
    node = {"arm": arm, "source_models": None}
    return OmegaConf.create({"actor_rollout_ref": {"model": {"path": path}}, "algorithm": {}, "qerl": node})


@pytest.mark.parametrize("arm", ["bf16", "nf4"])
def test_an_arm_without_packed_layers_runs_the_model_itself(tmp_path, bf16_checkpoint, capsys, arm):
    config, settings = actor_alone(str(bf16_checkpoint), arm), QeRLSettings(arm, cache_dir=str(tmp_path))
    assert replace_models.replace_models(config, settings) == {"actor_rollout_ref.model": bf16_checkpoint}
    assert config.actor_rollout_ref.model.path == config.qerl.source_models.actor == str(bf16_checkpoint)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    assert config.qerl.base_fingerprint.actor == fingerprint(bf16_checkpoint, tmp_path)
    assert f"model: {bf16_checkpoint} ({ARMS[arm].base})" in capsys.readouterr().out


def test_a_name_on_the_hub_stays_one_for_the_nodes_to_resolve(tmp_path, bf16_checkpoint, monkeypatch):
    monkeypatch.setattr("qerl_verl.nvfp4.cache.fetch_model", lambda name: bf16_checkpoint)
    config = actor_alone("someone/model", "bf16")
    replace_models.replace_models(config, QeRLSettings("bf16", cache_dir=str(tmp_path)))
    assert config.actor_rollout_ref.model.path == "someone/model"


def test_a_packed_model_is_refused_where_the_arm_wants_the_original(tmp_path, nvfp4_checkpoint):
    config = actor_alone(str(nvfp4_checkpoint), "bf16")
    with pytest.raises(SettingsError, match="is quantized to NVFP4: give the original model .* or use .qerl=nvfp4"):
        replace_models.replace_models(config, QeRLSettings("bf16", cache_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("hdfs://host/model", "hdfs://host/model"),
        ("~/model/", "{home}/model"),
        ("model", "{home}/model"),
        ("{home}/model", "{home}/model"),
    ],
)
def test_the_name_of_a_model_lasts_beyond_this_folder(tmp_path, monkeypatch, given, expected):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert replace_models.lasting_name(given.format(home=tmp_path)) == expected.format(home=tmp_path)
