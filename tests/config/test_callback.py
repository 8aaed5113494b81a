"""What the callback does around the rules."""

import json

import pytest
from omegaconf import OmegaConf

from qerl_verl.config import callback
from qerl_verl.config.rules import MODEL
from qerl_verl.config.settings import SettingsError


def with_adapter(tmp_path, **model):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 128}))
    model = {"lora_rank": 0, "lora_alpha": 16, "lora_adapter_path": str(tmp_path), **model}
    return OmegaConf.create({"actor_rollout_ref": {"model": model}})


def test_rank_and_alpha_come_from_the_adapter_to_go_on_from(tmp_path):
    config = with_adapter(tmp_path)
    callback._adopt_adapter(config, set())
    assert (config.actor_rollout_ref.model.lora_rank, config.actor_rollout_ref.model.lora_alpha) == (64, 128)


def test_a_rank_that_is_not_the_adapters_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="lora_rank=8, but the adapter .* has 64; remove the setting"):
        callback._adopt_adapter(with_adapter(tmp_path, lora_rank=8), {f"{MODEL}.lora_rank"})


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no adapter_config.json there"):
        callback._adopt_adapter(with_adapter(tmp_path, lora_adapter_path=str(tmp_path / "nowhere")), set())


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
