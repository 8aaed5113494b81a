"""Adapters that a run starts from."""

import json

import pytest
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from qerl_verl.config.adapters import adapter_problems, adopt_adapter
from qerl_verl.config.rules import CRITIC, MODEL
from qerl_verl.config.settings import SettingsError
from qerl_verl.nvfp4.checkpoint import quantize_checkpoint


def with_adapter(tmp_path, **model):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 128}))
    model = {"lora_rank": 0, "lora_alpha": 16, "lora_adapter_path": str(tmp_path), **model}
    return OmegaConf.create({"actor_rollout_ref": {"model": model}})


def test_rank_and_alpha_come_from_the_adapter_to_go_on_from(tmp_path):
    config = with_adapter(tmp_path)
    adopt_adapter(config, set())
    assert (config.actor_rollout_ref.model.lora_rank, config.actor_rollout_ref.model.lora_alpha) == (64, 128)


def test_a_rank_that_is_not_the_adapters_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="lora_rank=8, but the adapter .* has 64; remove the setting"):
        adopt_adapter(with_adapter(tmp_path, lora_rank=8), {f"{MODEL}.lora_rank"})


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no adapter_config.json there"):
        adopt_adapter(with_adapter(tmp_path, lora_adapter_path=str(tmp_path / "nowhere")), set())


def test_a_rank_of_a_recipe_that_is_not_the_adapters_is_refused_too(tmp_path):
    with pytest.raises(SettingsError, match="lora_rank=8, but the adapter .* has 64"):
        adopt_adapter(with_adapter(tmp_path, lora_rank=8), set())


def test_a_critics_adapter_is_read_as_well(tmp_path):
    config = with_adapter(tmp_path)
    config.critic = {"model": config.actor_rollout_ref.model}
    adopt_adapter(config, set(), CRITIC)
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
    return adapter_problems(config, role, adopt_adapter(config, set(keys), role))


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
