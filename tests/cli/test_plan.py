"""Tests the output of `qerl plan`, for a run that fits and for one that does not."""

import json
import re

import pytest

from qerl_verl.cli.main import main

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


@pytest.fixture
def model(tmp_path):
    """Returns a 72B model's configuration, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return f"actor_rollout_ref.model.path={tmp_path}"


def gib(text: str, part: str) -> float:
    return float(re.search(rf"([\d.]+)  {re.escape(part)}\n", text)[1])


def test_one_copy_of_a_large_base_fits_where_two_do_not(model, capsys):
    command = ["plan", "gsm8k_grpo_32b", "--gpu-memory", "79.2", model]
    assert main(command) == 2
    two = capsys.readouterr().out
    assert gib(two, "rollout's base") == gib(two, "base") and "does not fit:" in two
    proposed = [line.strip() for line in two.split("with these settings it does:\n")[1].splitlines()]
    assert proposed[0] == "qerl.base=shared"
    assert main([*command, *proposed]) == 0
    one = capsys.readouterr().out
    assert one.endswith("fits\n") and "rollout's base\n" not in one and gib(one, "base") == gib(two, "base")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give the name of a recipe"),
        (["plan", "gsm8k_grpo_32b", "qerl.base=copy"], "qerl.base=copy: choose one of"),
        (
            ["plan", "ppo_trainer", "+qerl=bf16", "algorithm.adv_estimator=grpo", "data.train_files=a.parquet"],
            "+qerl=bf16",
        ),
        (["plan", "gsm8k_grpo", "actor_rollout_ref.model.path=/nowhere"], "actor_rollout_ref.model.path=/nowhere"),
    ],
)
def test_what_cannot_be_planned_is_told(arguments, message, capsys):
    assert main([*arguments, "--gpu-memory", "80"]) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_its_memory_is_asked_for(model, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["plan", "gsm8k_grpo", model]) == 2
    assert "give the memory of one with --gpu-memory GIB" in capsys.readouterr().err
