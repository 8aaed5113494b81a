"""What the callback does around the rules."""

import pytest
from omegaconf import OmegaConf

from qerl_verl.config import callback
from qerl_verl.config.settings import SettingsError


def models(folder, actor, critic):
    config = {"actor_rollout_ref": {"model": {"path": actor}}, "critic": {"model": {"path": critic}, "enable": True}}
    return OmegaConf.create({**config, "algorithm": {"adv_estimator": "gae"}, "qerl": {"source_model": None}})


@pytest.mark.parametrize("critic", ["same", "${actor_rollout_ref.model.path}", "other"])
def test_one_model_is_one_checkpoint_and_another_is_quantized_too(
    tmp_path, bf16_checkpoint, model_factory, capsys, critic
):
    path = model_factory(tmp_path / "other", num_hidden_layers=1) if critic == "other" else bf16_checkpoint
    config = models(tmp_path, str(bf16_checkpoint), critic if "$" in critic else str(path))
    callback._replace_models(config, callback.QeRLSettings(cache_dir=str(tmp_path / "cache")))
    entries = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert len(entries) == (2 if critic == "other" else 1)
    assert (config.actor_rollout_ref.model.path == config.critic.model.path) is (critic != "other")
    assert config.qerl.source_model == str(bf16_checkpoint)
    assert {config.actor_rollout_ref.model.path, config.critic.model.path} == {str(e) for e in entries}
    assert ("critic: a checkpoint of its own" in capsys.readouterr().out) is (critic == "other")
    fingerprints = config.qerl.base_fingerprint
    assert set(fingerprints) == {"actor", "critic"} and (fingerprints.actor == fingerprints.critic) is (
        critic != "other"
    )


def test_a_model_that_cannot_be_had_is_named_with_its_key(tmp_path, bf16_checkpoint):
    config = models(tmp_path, str(bf16_checkpoint), "/nowhere")
    with pytest.raises(SettingsError, match="critic.model.path=/nowhere: .*no such folder"):
        callback._replace_models(config, callback.QeRLSettings(cache_dir=str(tmp_path / "cache")))


def test_another_program_of_verls_is_refused():
    with pytest.raises(SettingsError, match="verl.trainer.main_ppo"):
        callback.prepare(OmegaConf.create({"qerl": {}}), set())
