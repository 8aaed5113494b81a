"""What the callback does around the rules."""

import json

import pytest
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, Qwen2Config, Qwen2ForCausalLM

from qerl_verl.config import callback
from qerl_verl.config.rules import CRITIC, MODEL
from qerl_verl.config.settings import SettingsError
from qerl_verl.nvfp4.checkpoint import quantize_checkpoint


def with_adapter(tmp_path, **model):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 128}))
    model = {"lora_rank": 0, "lora_alpha": 16, "lora_adapter_path": str(tmp_path), **model}
    return OmegaConf.create({"actor_rollout_ref": {"model": model}})


def test_rank_and_alpha_come_from_the_adapter_to_go_on_from(tmp_path):
    config = with_adapter(tmp_path)
    callback.adopt_adapter(config, set())
    assert (config.actor_rollout_ref.model.lora_rank, config.actor_rollout_ref.model.lora_alpha) == (64, 128)


def test_a_rank_that_is_not_the_adapters_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="lora_rank=8, but the adapter .* has 64; remove the setting"):
        callback.adopt_adapter(with_adapter(tmp_path, lora_rank=8), {f"{MODEL}.lora_rank"})


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no adapter_config.json there"):
        callback.adopt_adapter(with_adapter(tmp_path, lora_adapter_path=str(tmp_path / "nowhere")), set())


def test_a_rank_of_a_recipe_that_is_not_the_adapters_is_refused_too(tmp_path):
    with pytest.raises(SettingsError, match="lora_rank=8, but the adapter .* has 64"):
        callback.adopt_adapter(with_adapter(tmp_path, lora_rank=8), set())


def test_a_critics_adapter_is_read_as_well(tmp_path):
    config = with_adapter(tmp_path)
    config.critic = {"model": config.actor_rollout_ref.model}
    callback.adopt_adapter(config, set(), CRITIC)
    assert config.critic.model.lora_rank == 64 and config.actor_rollout_ref.model.lora_rank == 0


@pytest.fixture
def adapter(tmp_path, bf16_checkpoint):
    """An adapter of the tiny model's q_proj and v_proj, as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(bf16_checkpoint)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def problems_of(adapter, base, keys=(), role=MODEL, **model):
    model = {
        "lora_rank": 0,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "lora_adapter_path": str(adapter),
        **model,
    }
    node = {"model": {**model, "path": str(base)}}
    config = OmegaConf.create({role.partition(".")[0]: node, "qerl": {"source_model": "Qwen/there"}})
    return callback._adapter_problems(config, role, callback.adopt_adapter(config, set(keys), role))


def test_an_adapter_that_fits_is_taken(adapter, nvfp4_checkpoint):
    assert problems_of(adapter, nvfp4_checkpoint) == []
    assert problems_of(adapter, nvfp4_checkpoint, target_modules=["v_proj", "q_proj"]) == []


def test_an_adapter_of_another_base_is_refused(adapter, model_factory, tmp_path):
    for name, shape in (("wide", {"hidden_size": 256}), ("short", {"num_hidden_layers": 1})):
        source = model_factory(tmp_path / name, **shape)
        quantize_checkpoint(source, tmp_path / f"{name}.nvfp4", progress=False)
        (problem,) = problems_of(adapter, tmp_path / f"{name}.nvfp4")
        assert problem.startswith(f"{MODEL}.lora_adapter_path={adapter}: the adapter was trained on ")
        assert "not on Qwen/there" in problem
        expected = "model.layers.1" if name == "short" else "lora_A.weight has 128 where the model needs 256"
        assert expected in problem


@pytest.mark.parametrize("keys", [(), (f"{MODEL}.target_modules",)])
def test_another_target_set_is_refused(adapter, nvfp4_checkpoint, keys):
    wanted = "all-linear" if keys else ["q_proj"]
    (problem,) = problems_of(adapter, nvfp4_checkpoint, keys, target_modules=wanted)
    assert problem.startswith(f"{MODEL}.target_modules={wanted}, but the adapter") and "remove the setting" in problem


@pytest.mark.parametrize("key, value", [("modules_to_save", ["embed_tokens"]), ("rank_pattern", {"q_proj": 8})])
def test_an_adapter_that_is_not_one_rank_of_lora_tensors_is_refused(adapter, nvfp4_checkpoint, key, value):
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**content, key: value}))
    (problem,) = problems_of(adapter, nvfp4_checkpoint)
    assert "lora_adapter_path" in problem and f"{key}={value}" in problem


def test_an_actors_adapter_is_none_for_a_critic(adapter, nvfp4_checkpoint):
    (problem,) = problems_of(adapter, nvfp4_checkpoint, role=CRITIC)
    assert problem.startswith(f"{CRITIC}.lora_adapter_path={adapter}: no value head in it")


def test_a_critics_adapter_is_none_for_an_actor(tmp_path, nvfp4_checkpoint, bf16_checkpoint):
    model = AutoModelForTokenClassification.from_pretrained(bf16_checkpoint, num_labels=1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="TOKEN_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "critic")
    assert problems_of(tmp_path / "critic", nvfp4_checkpoint, role=CRITIC) == []
    (problem,) = problems_of(tmp_path / "critic", nvfp4_checkpoint)
    assert (
        "modules_to_save" in problem
        and "plain LoRA tensors alone, of one rank, and a critic's head, can go on" in problem
    )


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
