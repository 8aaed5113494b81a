"""What the callback does around the rules."""

from types import SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from qerl_verl.config import callback
from qerl_verl.config.arms import ARMS
from qerl_verl.config.settings import SettingsError
from qerl_verl.nvfp4.cache import fingerprint
from qerl_verl.platform.lost_processes import LostProcess


def models(folder, actor, critic):
    config = {"actor_rollout_ref": {"model": {"path": actor}}, "critic": {"model": {"path": critic}, "enable": True}}
    return OmegaConf.create({**config, "algorithm": {"adv_estimator": "gae"}, "qerl": {"source_models": None}})


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
        callback._replace_models(config, callback.QeRLSettings(cache_dir=str(tmp_path / "cache")))


def actor_alone(path, arm):
    node = {"arm": arm, "source_models": None}
    return OmegaConf.create({"actor_rollout_ref": {"model": {"path": path}}, "algorithm": {}, "qerl": node})


@pytest.mark.parametrize("arm", ["bf16", "nf4"])
def test_an_arm_without_packed_layers_runs_the_model_itself(tmp_path, bf16_checkpoint, capsys, arm):
    config, settings = actor_alone(str(bf16_checkpoint), arm), callback.QeRLSettings(arm, cache_dir=str(tmp_path))
    assert callback._replace_models(config, settings) == {"actor_rollout_ref.model": bf16_checkpoint}
    assert config.actor_rollout_ref.model.path == config.qerl.source_models.actor == str(bf16_checkpoint)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    assert config.qerl.base_fingerprint.actor == fingerprint(bf16_checkpoint, tmp_path)
    assert f"model: {bf16_checkpoint} ({ARMS[arm].base})" in capsys.readouterr().out


def test_a_name_on_the_hub_stays_one_for_the_nodes_to_resolve(tmp_path, bf16_checkpoint, monkeypatch):
    monkeypatch.setattr("qerl_verl.nvfp4.cache.fetch_model", lambda name: bf16_checkpoint)
    config = actor_alone("someone/model", "bf16")
    callback._replace_models(config, callback.QeRLSettings("bf16", cache_dir=str(tmp_path)))
    assert config.actor_rollout_ref.model.path == "someone/model"


def test_a_packed_model_is_refused_where_the_arm_wants_the_original(tmp_path, nvfp4_checkpoint):
    config = actor_alone(str(nvfp4_checkpoint), "bf16")
    with pytest.raises(SettingsError, match="is quantized to NVFP4: give the original model .* or use .qerl=nvfp4"):
        callback._replace_models(config, callback.QeRLSettings("bf16", cache_dir=str(tmp_path)))


def test_another_program_of_verls_is_refused():
    with pytest.raises(SettingsError, match="verl.trainer.main_ppo"):
        callback.prepare(OmegaConf.create({"qerl": {}}), set())


NODE = "node2 (10.0.0.2): Connection closed by peer"
PROCESS = LostProcess("AgentLoopWorkerTQ (process 7 on 10.0.0.1)", "it ended abruptly")


@pytest.mark.parametrize(
    ("failed", "nodes", "processes", "said"),
    [
        (True, [NODE], [PROCESS], [f"because a node is gone: {NODE}", "when the cluster has its nodes again"]),
        (True, [], [PROCESS], [f"because a process is gone: {PROCESS.name};", "when the reason is mended"]),
        (True, [], [LostProcess("WorkerDict", "ValueError: bad", started=False)], []),
        (True, [], [], []),
        (False, [NODE], [PROCESS], []),
    ],
)
def test_a_run_that_fails_because_of_a_loss_names_it_and_how_to_go_on(capsys, failed, nodes, processes, said):
    result, made = JobReturn(), callback.QeRLCallback()
    result.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
    result.return_value = RuntimeError("Connection closed by peer") if failed else None
    ended = []
    made._nodes = SimpleNamespace(find_lost=lambda error, say: nodes)
    made._processes = SimpleNamespace(end=lambda failed: ended.append(failed) or processes)
    made.on_run_end(OmegaConf.create({"trainer": {"default_local_dir": "/shared/checkpoints"}}), result)
    lines = capsys.readouterr().out.splitlines()
    assert ended == [failed] and len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))
    assert not lines or lines[-1].endswith(" in /shared/checkpoints")


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
    assert callback._lasting_name(given.format(home=tmp_path)) == expected.format(home=tmp_path)
