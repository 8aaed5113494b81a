"""Adapters that a run starts from."""

import json

import pytest
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from qerl_verl.config.adapters import adapter_problems, adopt_adapter, target_problems
from qerl_verl.config.draft import Draft
from qerl_verl.config.rules import CRITIC, MODEL
from qerl_verl.config.settings import SettingsError


def with_adapter(tmp_path, **model):
    content = {"r": 64, "lora_alpha": 128, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    model = {"lora_rank": 0, "lora_alpha": 16, "lora_adapter_path": str(tmp_path), **model}
    return OmegaConf.create({"actor_rollout_ref": {"model": model}})


def test_rank_and_alpha_come_from_the_adapter_to_go_on_from(tmp_path):
    config = with_adapter(tmp_path)
    adopt_adapter(Draft(config), set())
    assert (config.actor_rollout_ref.model.lora_rank, config.actor_rollout_ref.model.lora_alpha) == (64, 128)


def test_a_rank_that_is_not_the_adapters_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="lora_rank=8, but the adapter .* has 64; remove the setting"):
        adopt_adapter(Draft(with_adapter(tmp_path, lora_rank=8)), {f"{MODEL}.lora_rank"})


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no adapter_config.json there"):
        adopt_adapter(Draft(with_adapter(tmp_path, lora_adapter_path=str(tmp_path / "nowhere"))), set())


@pytest.mark.parametrize("given", ["{}", "{}/", "~/A", "~/A/", "A", "./A/", "../home/A"])
def test_a_path_becomes_absolute(tmp_path, monkeypatch, given):
    (tmp_path / "home" / "A").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    config = with_adapter(tmp_path / "home" / "A", lora_adapter_path=given.format(tmp_path / "home" / "A"))
    adopt_adapter(Draft(config), set())
    assert config.actor_rollout_ref.model.lora_adapter_path == str(tmp_path / "home" / "A")


def test_verl_still_takes_no_slash_at_the_end():
    from verl.utils.fs import copy_to_local

    with pytest.raises(AssertionError, match="last char in src"):
        copy_to_local("/some/folder/")


def test_a_rank_of_a_recipe_that_is_not_the_adapters_is_refused_too(tmp_path):
    with pytest.raises(SettingsError, match="lora_rank=8, but the adapter .* has 64"):
        adopt_adapter(Draft(with_adapter(tmp_path, lora_rank=8)), set())


def test_a_critics_adapter_is_read_as_well(tmp_path):
    config = with_adapter(tmp_path)
    config.critic = {"model": config.actor_rollout_ref.model}
    adopt_adapter(Draft(config), set(), CRITIC)
    assert config.critic.model.lora_rank == 64 and config.actor_rollout_ref.model.lora_rank == 0


@pytest.fixture
def adapter(tmp_path, bf16_checkpoint):
    """Returns an adapter of the tiny model's q_proj and v_proj, as PEFT saves it."""
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
    config = OmegaConf.create(
        {role.partition(".")[0]: node, "qerl": {"source_models": {"actor": "Qwen/there", "critic": "Qwen/critic"}}}
    )
    return adapter_problems(config, role, adopt_adapter(Draft(config), set(keys), role))


def test_an_adapter_that_fits_is_taken(adapter, nvfp4_checkpoint):
    assert problems_of(adapter, nvfp4_checkpoint) == []
    assert problems_of(adapter, nvfp4_checkpoint, target_modules=["v_proj", "q_proj"]) == []


def test_a_model_that_is_not_yet_quantized_says_the_same(adapter, bf16_checkpoint):
    assert problems_of(adapter, bf16_checkpoint) == []


OTHER_BASES = [
    ({"hidden_size": 256}, "lora_A.weight has shape [4, 128] where the model and r=4 need [4, 256]"),
    ({"num_hidden_layers": 1}, "4 of its 8 tensors have no place in the model: base_model.model.model.layers.1."),
    ({"num_hidden_layers": 3}, "4 of the 12 LoRA tensors that its adapter_config.json promises are not in its file"),
]


@pytest.mark.parametrize("shape, expected", OTHER_BASES)
def test_an_adapter_of_another_base_is_refused(adapter, bf16_checkpoint, tmp_path, shape, expected):
    (tmp_path / "base").mkdir()
    content = json.loads((bf16_checkpoint / "config.json").read_text()) | shape
    content.pop("layer_types")
    (tmp_path / "base" / "config.json").write_text(json.dumps(content))
    (problem,) = problems_of(adapter, tmp_path / "base")
    assert problem.startswith(f"{MODEL}.lora_adapter_path={adapter}: ") and expected in problem
    assert problem.endswith(f"(the adapter was trained on {bf16_checkpoint}, not on Qwen/there)")


@pytest.mark.parametrize("keys", [(), (f"{MODEL}.target_modules",)])
def test_another_target_set_is_refused(adapter, nvfp4_checkpoint, keys):
    wanted = "all-linear" if keys else ["q_proj"]
    (problem,) = problems_of(adapter, nvfp4_checkpoint, keys, target_modules=wanted)
    assert problem.startswith(f"{MODEL}.target_modules={wanted}, but the adapter") and "remove the setting" in problem


@pytest.mark.parametrize("role", [MODEL, CRITIC])
@pytest.mark.parametrize("changes", [{"lora_alpha": 0}, {"use_dora": True}, {"trainable_token_indices": [3], "r": 0}])
def test_what_the_configuration_cannot_have_is_refused_with_the_setting(adapter, nvfp4_checkpoint, role, changes):
    content = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(content | changes))
    with pytest.raises(SettingsError) as error:
        problems_of(adapter, nvfp4_checkpoint, role=role)
    assert len(error.value.problems) == len(changes)
    for (key, value), problem in zip(
        sorted(changes.items()), sorted(error.value.problems, key=lambda p: p.split(": ")[1])
    ):
        assert problem.startswith(f"{role}.lora_adapter_path={adapter}: {key}={value} in its adapter_config.json")


@pytest.mark.parametrize(
    "model", [{"target_modules": r".*\.(q|v)_proj"}, {"exclude_modules": r".*mlp.*|.*\.[ko]_proj"}]
)
def test_the_same_targets_in_other_words_are_taken(adapter, nvfp4_checkpoint, model):
    assert problems_of(adapter, nvfp4_checkpoint, **model) == []


def test_an_exclusion_that_is_not_the_adapters_is_refused(adapter, nvfp4_checkpoint):
    (problem,) = problems_of(adapter, nvfp4_checkpoint, exclude_modules=".*mlp.*")
    assert problem.startswith(f"{MODEL}.exclude_modules=.*mlp.*, but the adapter") and "remove the setting" in problem


@pytest.mark.parametrize("role", [MODEL, CRITIC])
def test_targets_of_a_new_adapter_are_looked_up_in_the_model(nvfp4_checkpoint, role):
    model = {"path": str(nvfp4_checkpoint), "target_modules": ["q_proj", "wq"], "exclude_modules": None}
    config = OmegaConf.create({role.partition(".")[0]: {"model": model}})
    (problem,) = target_problems(config, role)
    assert problem == (
        f"{role}.target_modules: wq is none of the linear layers. The model has q_proj, k_proj, v_proj, gate_proj, up_proj, "
        "o_proj, down_proj; remove it"
    )


def test_an_actors_adapter_is_none_for_a_critic(adapter, nvfp4_checkpoint):
    (problem,) = problems_of(adapter, nvfp4_checkpoint, role=CRITIC)
    assert problem.startswith(f"{CRITIC}.lora_adapter_path={adapter}: no value head in it")


def test_a_critics_adapter_is_none_for_an_actor(tmp_path, nvfp4_checkpoint, bf16_checkpoint):
    model = AutoModelForTokenClassification.from_pretrained(bf16_checkpoint, num_labels=1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="TOKEN_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "critic")
    assert problems_of(tmp_path / "critic", nvfp4_checkpoint, role=CRITIC) == []
    with pytest.raises(
        SettingsError, match="modules_to_save.*plain LoRA tensors alone, of one rank, and a critic's head"
    ):
        problems_of(tmp_path / "critic", nvfp4_checkpoint)
