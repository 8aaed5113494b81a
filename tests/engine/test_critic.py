"""Tests the critic's engine: value head, checkpoints, two ranks."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification

from qerl_verl.job import Job
from tests.helpers.jobs import sharing_job

HEAD = {"base_model.model.score.weight", "base_model.model.score.bias"}


@pytest.fixture(scope="module")
def critic(run_engine, tmp_path_factory, nvfp4_checkpoint):
    """Trains four steps on one rank, and saves after the second."""
    folder = tmp_path_factory.mktemp("critic")
    save = str(folder / "ckpt" / "critic")
    settings = {"model_type": "value_model", "steps": 4, "save_after": 2, "save": save}
    sources = {"actor": "made/up", "critic": "made/up-critic"}
    return folder, run_engine(
        nvfp4_checkpoint, folder / "r", environment=Job(sources=sources).environment(), **settings
    )[0]


def test_an_nvfp4_base_trains_adapters_and_a_value_head_in_float32(critic):
    parameters = critic[1]["parameters"]
    assert critic[1]["class"] == "NVFP4EngineWithValueHead"
    packed = [n for n in parameters if n.endswith(".weight_joined")]
    assert len(packed) == 2 * 7 and not any(parameters[n]["trains"] for n in packed)
    trained = {n: p for n, p in parameters.items() if p["trains"]}
    head = {n: p for n, p in trained.items() if "lora_" not in n}
    assert sorted(p["bytes"] for p in head.values()) == [4, 4 * 128] and all(".score." in n for n in head)
    assert {p["dtype"] for p in trained.values()} == {"torch.float32"}
    assert not any("score" in n for n in trained if "lora_" in n)  # no adapter on the head


def test_a_critic_of_the_actors_checkpoint_uses_the_shared_base(run_engine, critic, nvfp4_checkpoint, tmp_path):
    """With qerl.base=shared results are equal bit for bit, also where the critic is built before
    the actor.
    """
    sharing = sharing_job(model=str(nvfp4_checkpoint)).environment()
    report = run_engine(nvfp4_checkpoint, tmp_path / "r", environment=sharing, model_type="value_model", steps=4)[0]
    assert all(report[what] == critic[1][what] for what in ("built", "steps", "adapter"))
    assert not any(name.endswith(".weight_joined") for name in report["parameters"])
    assert "base: the critic uses the" in (tmp_path / "r.0.log").read_text()


def test_training_lowers_the_loss_and_moves_the_head(critic):
    steps = critic[1]["steps"]
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"] and all(s["grad_norm"] > 0 for s in steps)
    folder = critic[0]
    at_two = load_file(folder / "ckpt" / "critic" / "lora_adapter" / "adapter_model.safetensors")
    at_four = torch.load(f"{folder}/r.adapter.pt")
    assert HEAD < set(at_two) == set(at_four)
    for name in HEAD:
        assert at_two[name].dtype == torch.float32 and not torch.equal(at_two[name], at_four[name])


def test_a_checkpoint_holds_adapter_and_head_and_optimizer_of_both(critic):
    folder = critic[0] / "ckpt" / "critic"
    state = torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=False)
    head = torch.load(folder / "value_head_world_size_1_rank_0.pt", weights_only=False)
    assert state and all("lora_" in name for name in state)
    assert len(head) == 2 and all("score" in name for name in head)
    optimizer = torch.load(folder / "optim_world_size_1_rank_0.pt", weights_only=False)
    assert len(optimizer["state"]) == len(state) + len(head)


def test_resuming_restores_the_head_and_continues_bit_for_bit(run_engine, critic, nvfp4_checkpoint, tmp_path):
    """A checkpoint without its head is refused first, and the engine still works."""
    folder, unbroken = critic
    shutil.copytree(folder / "ckpt" / "critic", tmp_path / "headless")
    (tmp_path / "headless" / "value_head_world_size_1_rank_0.pt").unlink()
    resumed = run_engine(
        nvfp4_checkpoint,
        tmp_path / "r",
        model_type="value_model",
        steps=4,
        first_step=2,
        load=str(folder / "ckpt" / "critic"),
        refused=str(tmp_path / "headless"),
    )[0]
    assert "value_head_world_size_1_rank_0.pt" in resumed["refused"]
    assert resumed["loaded"] == unbroken["saved"] != unbroken["adapter"]
    assert resumed["steps"] == unbroken["steps"][2:] and resumed["adapter"] == unbroken["adapter"]


def test_two_ranks_train_the_same_critic(run_engine, critic, nvfp4_checkpoint, tmp_path):
    reports = run_engine(nvfp4_checkpoint, tmp_path / "r", world=2, model_type="value_model", steps=4)
    assert reports[0]["adapter"] == reports[1]["adapter"]
    # the head starts from the seed alone
    assert reports[0]["built"] == reports[1]["built"] == critic[1]["built"]
    for found, expected in zip(reports[0]["steps"], critic[1]["steps"], strict=True):
        # of sums in another order, squared in the loss
        rounding = 4 * torch.finfo(torch.bfloat16).eps
        assert found["loss"] == pytest.approx(expected["loss"], rel=rounding)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=rounding)


def test_training_goes_on_from_a_critics_adapter_folder_head_included(
    run_engine, critic, nvfp4_checkpoint, tmp_path, without_prefix
):
    adapter = without_prefix(critic[0] / "ckpt" / "critic" / "lora_adapter", tmp_path / "adapter")
    settings = {"model_type": "value_model", "lora_adapter_path": str(adapter)}
    for report in run_engine(nvfp4_checkpoint, tmp_path / "r", world=2, **settings):
        assert report["built"] == critic[1]["saved"]
        trained = [n for n, p in report["parameters"].items() if p["trains"] and "lora_" not in n]
        assert len(trained) == 2 and all(".score." in n for n in trained)


def test_stock_peft_loads_the_critics_adapter(critic, dequantized_checkpoint):
    adapter = critic[0] / "ckpt" / "critic" / "lora_adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS" and "score" in config["modules_to_save"]
    assert config["base_model_name_or_path"] == "made/up-critic"
    base = AutoModelForTokenClassification.from_pretrained(dequantized_checkpoint, num_labels=1)
    model = PeftModel.from_pretrained(base, adapter)
    saved = load_file(adapter / "adapter_model.safetensors")
    head = model.base_model.model.score.modules_to_save["default"]
    assert torch.equal(head.weight, saved["base_model.model.score.weight"])
    values = model(input_ids=torch.arange(3, 11)[None]).logits
    assert values.shape == (1, 8, 1) and values.isfinite().all()
