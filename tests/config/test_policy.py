"""What defines a policy: recorded in a checkpoint, compared when a run resumes."""

import json

import pytest
from omegaconf import OmegaConf

from qerl_verl.cli.explain import compose
from qerl_verl.config.checks import resume
from qerl_verl.config.host import Host
from qerl_verl.config.plan import plan
from qerl_verl.config.policy import describe_policy, find_changes
from qerl_verl.config.rules import CRITIC, MODEL

HOST = Host(cpus=64, gpus=0, cpu_vllm=True)


def configuration(model, *overrides):
    """Returns the configuration after the plan of a run on the CPU, and the adapters that it starts
    from."""
    overrides = ["+qerl=nvfp4", f"{MODEL}.path={model}", *overrides]
    if not any("adv_estimator" in override for override in overrides):
        overrides.append("algorithm.adv_estimator=grpo")
    config = compose("ppo_trainer", overrides)
    made = plan(config, {o.lstrip("+").partition("=")[0] for o in overrides}, HOST)
    return made.config, made


def problems_of(model, *overrides):
    """Returns the plan's problems, without those of verl's absent default data files."""
    return [p for p in configuration(model, *overrides)[1].problems if not p.startswith("data.")]


def policy(model, *overrides):
    config, made = configuration(model, *overrides)
    return json.loads(json.dumps(describe_policy(config, made.adapters)))


@pytest.fixture(scope="module")
def first(bf16_checkpoint):
    """Returns the policy of a run with the switch's defaults."""
    return policy(bf16_checkpoint)


def test_everything_that_defines_the_policy_is_recorded(first, bf16_checkpoint, nvfp4_checkpoint):
    assert first[f"{MODEL}.lora_rank"] == 32 and first[f"{MODEL}.lora_alpha"] == 32
    assert first[f"{MODEL}.use_rslora"] is False
    assert first[f"{MODEL}.target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert first["actor_rollout_ref.rollout.dtype"] in ("bfloat16", "float32")
    noise = {key for key in first if key.startswith("qerl.aqn.")}
    assert noise == {f"qerl.aqn.{name}" for name in compose("ppo_trainer", ["+qerl=nvfp4"]).qerl.aqn}
    assert policy(nvfp4_checkpoint) == first  # quantized meanwhile
    with_critic = policy(bf16_checkpoint, "algorithm.adv_estimator=gae", f"{CRITIC}.path={bf16_checkpoint}")
    assert with_critic[f"{CRITIC}.lora_alpha"] == 32 and with_critic[f"{CRITIC}.target_modules"]


CHANGED = [
    # verl's default alpha
    (["{M}.lora_rank=32"], ["{M}.lora_alpha was 32 and is 16; set {M}.lora_alpha=32"]),
    (["{M}.lora_alpha=64"], ["{M}.lora_alpha was 32 and is 64; set {M}.lora_alpha=32"]),
    (
        ["{M}.lora_rank=16", "{M}.lora_alpha=16"],
        ["{M}.lora_alpha was 32 and is 16", "{M}.lora_rank was 32 and is 16; set {M}.lora_rank=32"],
    ),
    (["{M}.target_modules=[q_proj]"], ["{M}.target_modules was ['down_proj', ", "set {M}.target_modules=[down_proj,"]),
    (["{M}.exclude_modules='.*mlp.*'"], ["is ['k_proj', 'o_proj', 'q_proj', 'v_proj']; set {M}.target_modules=[down_proj,"]),
    (["qerl.aqn.sigma_start=2e-2"], ["qerl.aqn.sigma_start was 0.01 and is 0.02; set qerl.aqn.sigma_start=0.01"]),
    (["qerl.aqn.seed=7"], ["qerl.aqn.seed was 42 and is 7; set qerl.aqn.seed=42"]),
    (["qerl.aqn.enable=False"], ["qerl.aqn.enable was True and is False; set qerl.aqn.enable=True"]),
    (["actor_rollout_ref.rollout.dtype=float16"], ["actor_rollout_ref.rollout.dtype was ", " and is float16; set "]),
]  # fmt: skip
"""What a run that resumes sets, and what is said."""


@pytest.mark.parametrize("overrides, expected", CHANGED)
def test_a_change_is_named_with_both_values_and_the_fix(first, bf16_checkpoint, overrides, expected):
    changes = find_changes(first, policy(bf16_checkpoint, *(o.format(M=MODEL) for o in overrides)))
    for text in expected:
        assert any(text.format(M=MODEL) in change for change in changes), changes


SAME = [
    ["{M}.target_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"],
    ["{M}.target_modules='.*_proj'"],
    ["{M}.lora_rank=32", "{M}.lora_alpha=32"],
    ["trainer.total_training_steps=7"],
]


@pytest.mark.parametrize("overrides", SAME)
def test_the_same_in_other_words_is_no_change(first, bf16_checkpoint, overrides):
    assert find_changes(first, policy(bf16_checkpoint, *(o.format(M=MODEL) for o in overrides))) == []


def test_without_noise_its_settings_do_not_matter(bf16_checkpoint):
    off = policy(bf16_checkpoint, "qerl.aqn.enable=False")
    assert find_changes(off, off | {"qerl.aqn.seed": 1}) == []
    assert len(find_changes(off, off | {"qerl.aqn.enable": True})) == 1


def test_an_adapter_with_rslora_has_another_scale(first, bf16_checkpoint, tmp_path):
    adapter = {"r": 32, "lora_alpha": 32, "use_rslora": True, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    changes = find_changes(first, policy(bf16_checkpoint, f"{MODEL}.lora_adapter_path={tmp_path}"))
    assert any(c.startswith(f"{MODEL}.use_rslora was False and is True; give the lora_adapter_path") for c in changes)


def test_what_was_not_recorded_is_let_through(first):
    assert find_changes({}, first) == [] and find_changes({"qerl.aqn.gone": 1}, first) == []


@pytest.mark.parametrize("mode", ["auto", "resume_path"])
def test_a_resume_with_another_policy_is_refused_before_ray(bf16_checkpoint, tmp_path, first, mode):
    from qerl_verl.trainer.checkpoints import write_record

    folder = tmp_path / "global_step_3"
    folder.mkdir()
    write_record(folder, {"actor": "b1"}, first)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    settings = [f"trainer.default_local_dir={tmp_path}", f"trainer.resume_mode={mode}"]
    settings += [f"trainer.resume_from_path={folder}"] if mode == "resume_path" else []
    assert problems_of(bf16_checkpoint, *settings) == []
    (problem,) = problems_of(bf16_checkpoint, *settings, f"{MODEL}.lora_rank=32")
    assert f"{folder} was saved by a run with another policy: {MODEL}.lora_alpha was 32 and is 16; set " in problem
    assert f"trainer.resume_mode=disable {MODEL}.lora_adapter_path={folder}/actor/lora_adapter" in problem

    config, made = configuration(bf16_checkpoint, *settings)
    OmegaConf.update(config, "qerl.base_fingerprint", {"actor": "b2"}, force_add=True)
    (problem,) = resume.find_problems(config, made.adapters)
    assert "trained on another base" in problem


def test_a_folder_in_which_nothing_is_whole_is_refused_before_ray(bf16_checkpoint, tmp_path):
    (tmp_path / "global_step_3").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (problem,) = problems_of(bf16_checkpoint, f"trainer.default_local_dir={tmp_path}")
    assert problem.startswith(f"trainer.default_local_dir={tmp_path}: no checkpoint in")
