"""One plan for a run and for `qerl explain`: the same values, the same problems, and nothing is
started."""

from dataclasses import replace

import pytest
from omegaconf import OmegaConf

import qerl_verl.plugin  # noqa: F401  (as verl loads it; a run asks for that)
from qerl_verl.cli.explain import compose, compose_with_keys
from qerl_verl.cli.main import main
from qerl_verl.config import callback
from qerl_verl.config.draft import apply
from qerl_verl.config.host import Host
from qerl_verl.config.keys import VARIABLES, override_keys
from qerl_verl.config.plan import Plan, plan
from qerl_verl.config.publish import published

HOST = Host(cpus=64, gpus=0, cpu_vllm=True)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"trainer": {}}, "the switch is off: add +qerl=nvfp4"),
        ({"qerl": {}, "trainer": {}}, "a switch for `python -m verl.trainer.main_ppo`; this is another program's"),
        ({"qerl": {"aqn": {"num_stages": 1}}, "actor_rollout_ref": {}}, "qerl.aqn.num_stages=1: must be at least 2"),
    ],
)
def test_what_comes_before_the_rules_is_the_only_problem(config, expected):
    (problem,) = plan(OmegaConf.create(config), set(), HOST).problems
    assert expected in problem


def test_problems_of_all_areas_are_reported_together(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    overrides = [
        "+qerl=nvfp4",
        "algorithm.adv_estimator=grpo",
        "trainer.use_v1=False",
        f"actor_rollout_ref.model.path={tmp_path}",
        "actor_rollout_ref.model.lora_adapter_path=/nowhere",
    ]
    host = Host(cpus=64, gpus=0, cpu_vllm=True, environment={"VERL_USE_EXTERNAL_PLUGINS": "none"})
    problems = "\n".join(plan(compose("ppo_trainer", overrides), set(), host).problems)
    for expected in ("VERL_USE_EXTERNAL_PLUGINS=none", "trainer.use_v1=False", "GPT2LMHeadModel", "no adapter_config"):
        assert expected in problems


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "1"}])
def test_a_run_says_what_explain_prints(monkeypatch, capsys, gsm8k_files, bf16_checkpoint, environment):
    """Both go through plan() on one host; this fails when one of them sets or checks something
    beside it."""
    host = replace(HOST, environment=environment)
    monkeypatch.setattr(Host, "here", lambda: host)
    overrides = [
        "+qerl=nvfp4",
        "algorithm.adv_estimator=grpo",
        "data.train_files=data/gsm8k/train.parquet",
        "data.val_files=data/gsm8k/test.parquet",
        f"actor_rollout_ref.model.path={bf16_checkpoint}",
        "trainer.total_training_steps=100",  # the data gives 30
    ]
    assert main(["explain", "ppo_trainer", "--platform", "cpu", *overrides]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("set by the switch:") + 1
    explained = [line.strip() for line in lines[start : lines.index("", start)]]

    for step in ("_use_cpu_in_this_process", "replace_models", "give_job_folder", "start_watch"):
        monkeypatch.setattr(callback, step, lambda *arguments: {})
    config, keys = compose_with_keys("ppo_trainer", overrides)
    callback.prepare(config, keys)
    said = [line.removeprefix("[qerl] ") for line in capsys.readouterr().out.splitlines()]
    assert [line for line in said if not line.startswith("platform:")] == explained
    assert any("the training data ends after 30 steps" in line for line in said)
    if environment:
        assert any(line.startswith("OMP_NUM_THREADS=2") for line in said)


@pytest.mark.parametrize(
    ("cpu_vllm", "expected"),
    [(False, "cuda"), (True, "cpu")],  # a cluster's head without GPUs, and a machine without any
)
def test_a_ray_that_runs_already_is_joined_without_its_address_being_given(
    monkeypatch, gsm8k_files, bf16_checkpoint, cpu_vllm, expected
):
    """Ray would join it: so the platform is the cluster's, nothing is declared to it, and no folder
    of this host is given."""
    from ray._private import services

    from qerl_verl.config.checks import resources

    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: "10.0.0.1:6379")
    monkeypatch.setattr(resources, "answers", lambda address: True)
    config = compose("gsm8k_grpo_8gpu", [f"actor_rollout_ref.model.path={bf16_checkpoint}"])
    made = plan(config, set(), Host(cpus=2, gpus=0, cpu_vllm=cpu_vllm))
    assert made.problems == [] and made.platform == expected and made.cluster.address == "10.0.0.1:6379"
    ray_init = made.config.ray_kwargs.ray_init
    assert ray_init.num_cpus is None and "num_gpus" not in ray_init
    assert any(line.startswith("Ray: joins the cluster at 10.0.0.1:6379 (a Ray that runs") for line in made.lines)

    for step in ("_use_cpu_in_this_process", "_check_that_verl_loaded_the_plugin", "start_watch"):
        monkeypatch.setattr(callback, step, lambda *arguments: None)
    given = []
    monkeypatch.setattr(callback, "give_job_folder", given.append)
    monkeypatch.setattr(callback, "replace_models", lambda *arguments: {callback.MODEL: bf16_checkpoint})
    for cluster in (made.cluster, None):
        monkeypatch.setattr(
            callback,
            "plan",
            lambda *arguments, cluster=cluster: Plan(made.changes, platform="cuda", cluster=cluster),
        )
        OmegaConf.update(config, "qerl.source_models", {"actor": "someone/model"}, force_add=True)
        callback.prepare(config, set())
        assert bool(given) is (cluster is None) and published(config).sources == {"actor": "someone/model"}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("arm", ["nvfp4", "bf16"])
def test_a_plan_leaves_the_configuration_as_it_is_and_its_changes_lead_to_what_it_checked(arm, platform):
    overrides = [f"+qerl={arm}", "algorithm.adv_estimator=gae", "qerl.base=separate"]
    config = compose("ppo_trainer", overrides)
    before = OmegaConf.to_container(config)
    plans = [plan(config, override_keys(overrides), HOST, platform, here=False) for _ in range(2)]
    assert OmegaConf.to_container(config) == before
    assert plans[0] == plans[1] and plans[0].changes
    apply(config, plans[0].changes)
    assert OmegaConf.to_container(config) == OmegaConf.to_container(plans[0].config) != before
    said = [str(change) for change in plans[0].changes if change.key != VARIABLES]
    assert [line for line in plans[0].lines if line in said] == said
