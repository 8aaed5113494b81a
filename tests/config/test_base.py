"""Which runs use one copy of the base, and what is set for that."""

import json

import pytest

from qerl_verl.config.base import choose_base, describe_cost, find_obstacle
from qerl_verl.config.host import Host
from qerl_verl.config.keys import override_keys
from qerl_verl.config.plan import plan
from qerl_verl.config.publish import published
from qerl_verl.config.replace_models import publish_models
from qerl_verl.job import BaseSharing

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
TP_1 = f"{ROLLOUT}.tensor_model_parallel_size=1"


@pytest.mark.parametrize(
    ("overrides", "environment", "reason"),
    [
        ((TP_1,), {}, None),
        ((TP_1, "trainer.v1.trainer_mode=colocate_async"), {}, None),
        ((TP_1, "qerl.kernel=pytorch", "qerl.rollout.kernel=pytorch"), {}, None),
        ((TP_1, f"{ROLLOUT}.load_format=auto"), {}, None),
        (("trainer.n_gpus_per_node=8", "trainer.nnodes=2", TP_1), {}, None),
        ((f"{ROLLOUT}.tensor_model_parallel_size=2",), {}, "tensor_model_parallel_size=2"),
        ((TP_1, f"{ROLLOUT}.data_parallel_size=2"), {}, "data_parallel_size=2"),
        ((TP_1, f"{ROLLOUT}.pipeline_model_parallel_size=2"), {}, "pipeline_model_parallel_size=2"),
        ((TP_1, f"{ROLLOUT}.disaggregation.enabled=True"), {}, "engines of their own"),
        ((TP_1, "trainer.v1.trainer_mode=separate_async"), {}, "devices of their own"),
        ((TP_1, "qerl.kernel=hopper", "qerl.rollout.kernel=triton"), {}, "each in its own way"),
        ((TP_1, "qerl.rollout.lora=punica"), {}, "vLLM's own LoRA path"),
        ((TP_1, "qerl.rollout.kernel=marlin"), {}, "vLLM's Marlin"),
        ((TP_1, f"{ACTOR}.fsdp_config.offload_policy=True"), {}, "waits in host memory"),
        ((TP_1, f"{ROLLOUT}.load_format=runai_streamer"), {}, "load_format=runai_streamer"),
        ((TP_1,), {"CUDA_VISIBLE_DEVICES": "MIG-1a2b"}, "(MIG)"),
    ],
)
def test_what_keeps_a_run_from_sharing_is_named(switched, overrides, environment, reason):
    config, _, _ = switched(*overrides)
    found = find_obstacle(config, environment)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(("name", "shares"), [("Qwen2ForCausalLM", True), ("Olmo2ForCausalLM", False), ("GPT2", None)])
def test_a_model_that_has_not_been_tried_is_named(switched, tmp_path, name, shares):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [name]}))
    config, _, _ = switched(TP_1, f"actor_rollout_ref.model.path={tmp_path}")
    found = find_obstacle(config, {})
    assert found == (None if shares is not False else f"one copy of the base has not been tried with {name}")


@pytest.mark.parametrize(
    ("setting", "obstacle", "on_cpu", "shared", "reason"),
    [
        ("auto", None, True, True, "qerl.base=auto"),
        ("auto", None, False, False, "on GPUs sharing has not been measured"),
        ("auto", "MIG", True, False, "MIG"),
        ("shared", None, False, True, "qerl.base=shared"),
        ("separate", "MIG", True, False, "qerl.base=separate"),
    ],
)
def test_the_choice_and_its_reason(setting, obstacle, on_cpu, shared, reason):
    found, why = choose_base(setting, obstacle, on_cpu)
    assert found is shared and reason in why


def planned(composed, *overrides):
    overrides = ("algorithm.adv_estimator=grpo", "data.train_files=a.parquet", *overrides)
    config = composed(*overrides)
    made = plan(config, override_keys(list(overrides)), Host(cpus=64, gpus=0, cpu_vllm=True), here=False)
    return made.config, made


def test_a_shared_base_reaches_rollout_and_actor(composed):
    config, made = planned(composed, "actor_rollout_ref.model.lora_rank=8", "qerl.rollout.sleep_level=2")
    assert "qerl.rollout.sleep_level=2 has no effect: a shared base stays where it is" in made.lines
    config.actor_rollout_ref.model.path = "/cache/model"
    assert made.shares_base and "base: one copy for actor and rollout (qerl.base=auto)" in made.lines
    assert config.actor_rollout_ref.rollout.load_format == "qerl_shared"
    job = published(config)
    assert job.sharing == BaseSharing() and job.settings.base == "auto"
    assert job.lora.rank == 8 and job.dtype == config.actor_rollout_ref.rollout.dtype
    publish_models(config)
    assert published(config).sharing.model == "/cache/model" and len(published(config).sharing.key) == 32


def test_each_job_has_a_key_of_its_own(composed):
    configs = [planned(composed)[0] for _ in range(2)]
    for config in configs:
        publish_models(config)
    assert len({published(config).sharing.key for config in configs}) == 2


def test_two_copies_change_nothing_and_say_why(composed):
    config, made = planned(composed, "qerl.base=separate")
    assert not made.shares_base and config.actor_rollout_ref.rollout.load_format == "safetensors"
    assert "base: a copy each in actor and rollout (qerl.base=separate)" in made.lines
    assert published(config).sharing is None


def test_an_insisted_on_base_that_cannot_be_shared_is_refused(composed):
    _, made = planned(composed, "qerl.base=shared", "qerl.rollout.kernel=marlin")
    (problem,) = [p for p in made.problems if p.startswith("qerl.base")]
    assert problem == (
        "qerl.base=shared: vLLM's Marlin lays out the weights in its own way (qerl.rollout.kernel=marlin); use "
        "qerl.base=auto or separate"
    )


def test_the_cost_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"0" * (1 << 24))
    assert describe_cost(tmp_path, True) == "0.02 GiB, in memory once"
    assert describe_cost(tmp_path, False).startswith("0.02 GiB, in the rollout once more")
