"""What the callback does around the rules."""

import json

import pytest
from omegaconf import OmegaConf
from transformers import Qwen2Config, Qwen2ForCausalLM

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


@pytest.mark.parametrize(
    ("fused", "tied", "refused"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_fused_kernels_need_a_tied_output_layer(tmp_path, fused, tied, refused):
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    config = OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(tmp_path), "use_fused_kernels": fused}}})
    problems = callback._fused_kernel_problems(config)
    assert bool(problems) == refused
    assert not refused or "use_fused_kernels=True" in problems[0]


def test_verl_still_shards_an_untied_output_layer_by_itself():
    """Why fused kernels are refused on such a model; when this fails, the refusal can go."""
    from verl.utils.fsdp_utils import _select_fsdp2_wrap_targets

    def wrapped(tied):
        settings = Qwen2Config(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=16, tie_word_embeddings=tied,
        )  # fmt: skip
        model = Qwen2ForCausalLM(settings)
        return model.lm_head in _select_fsdp2_wrap_targets(model, ["Qwen2DecoderLayer"])

    assert wrapped(tied=False) and not wrapped(tied=True)


def test_another_program_of_verls_is_refused():
    with pytest.raises(SettingsError, match="verl.trainer.main_ppo"):
        callback.prepare(OmegaConf.create({"qerl": {}}), set())


def test_keys_of_overrides():
    assert callback.user_keys(["+a.b=1", "++c=2", "~d", "e.f='x=y'"]) == {"a.b", "c", "d", "e.f"}


@pytest.mark.parametrize(
    ("setting", "gpu", "cpu_vllm", "joins", "expected"),
    [
        ("auto", True, False, False, "cuda"),
        ("auto", False, True, False, "cpu"),
        ("auto", False, False, True, "cuda"),
        ("cpu", True, True, False, "cpu"),
        ("auto", False, False, False, "no GPU is visible and the installed vLLM is a CUDA build"),
        ("cuda", True, True, False, "the installed vLLM is the CPU build"),
        ("cpu", True, False, False, "CUDA build"),
    ],
)
def test_the_platform_is_chosen_by_what_is_there(monkeypatch, setting, gpu, cpu_vllm, joins, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr(callback, "_vllm_is_cpu_build", lambda: cpu_vllm)
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379") if joins else monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = callback.QeRLSettings(platform=setting)
    if expected in ("cuda", "cpu"):
        assert callback.choose_platform(settings, OmegaConf.create({})) == expected
    else:
        with pytest.raises(SettingsError, match=expected):
            callback.choose_platform(settings, OmegaConf.create({}))
