"""A mixture of experts through main_ppo: verl, Ray, vLLM, with the experts in NVFP4 on both
sides."""

import re

import pytest

from qerl_verl.quickstart.tiny_model import build_tokenizer
from tests.helpers.tiny_families import make_family
from tests.integration.tiny_job import Job, make_inputs

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Metrics by step and the log of a run of three steps, the first without noise."""
    folder, tokenizer = tmp_path_factory.mktemp("experts"), build_tokenizer()
    sizes = dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = make_family("Qwen3MoeForCausalLM", folder / "model", std=0.08, **sizes)
    tokenizer.save_pretrained(model)
    overrides = [
        *make_inputs(folder, model),
        f"qerl.aqn.num_stages={STEPS}",
        "actor_rollout_ref.model.enable_gradient_checkpointing=True",
        "actor_rollout_ref.model.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]",
        "actor_rollout_ref.rollout.enable_rollout_routing_replay=True",
        # on every CPU, so that the two policies differ in nothing but the order of sums
        "actor_rollout_ref.rollout.dtype=float32",
        "++actor_rollout_ref.actor.fsdp_config.mixed_precision={param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}",
        f"trainer.total_training_steps={STEPS}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"trainer.save_freq={STEPS}",
    ]
    job = Job(folder / "run", overrides).start()
    try:
        assert job.wait(1500) == 0, job.tail()
        return job.metrics(), job.log.read_text(errors="replace"), folder / "checkpoints"
    finally:
        job.end()


def test_it_trains(run):
    metrics, _, _ = run
    assert sorted(metrics)[-1] == STEPS
    assert all(metrics[step]["actor/grad_norm"] > 0 for step in range(1, STEPS + 1))


def test_actor_and_rollout_are_one_policy(run):
    """Without noise the two differ by rounding alone, with an adapter on the experts of both. Noise
    makes the difference, also where a token's experts are those of the rollout."""
    metrics, _, _ = run
    assert metrics[1]["qerl/aqn_sigma"] == 0 and metrics[2]["qerl/aqn_sigma"] > 0
    assert metrics[1]["training/rollout_probs_diff_max"] < 1e-6
    assert metrics[2]["training/rollout_probs_diff_max"] > 1e-3


def test_the_log_says_what_computes_the_experts(run):
    _, log, _ = run
    assert re.search(r"kernel: actor NVFP4 linear = .*gate_up_proj 1", log)
    assert re.search(r"kernel: rollout NVFP4 linear = .*experts", log)
    assert "also in the experts" in log
    assert "routing: the actor replays the rollout's choice of experts in 1 layer\n" in log
    assert re.search(r"base: a copy each in actor and rollout \(.*Qwen3MoeForCausalLM", log)


def test_the_adapter_is_on_every_linear_of_every_expert(run):
    """By the names that PEFT and vLLM load; it has trained."""
    from safetensors.torch import load_file

    _, _, checkpoints = run
    tensors = load_file(checkpoints / f"global_step_{STEPS}" / "actor" / "lora_adapter" / "adapter_model.safetensors")
    linears = ("gate_proj", "up_proj", "down_proj")
    wanted = {f"model.layers.0.mlp.experts.{expert}.{linear}" for expert in range(4) for linear in linears}
    wanted |= {f"model.layers.{layer}.self_attn.{x}_proj" for layer in range(2) for x in "qkvo"}
    assert tensors.keys() == {f"base_model.model.{name}.lora_{part}.weight" for name in wanted for part in "AB"}
    trained = [name for name, tensor in tensors.items() if "lora_B" in name and ".experts." in name and tensor.any()]
    assert trained
