"""Tests `qerl explain`, the configuration of a run, and `qerl cluster`, which waits for a Ray
cluster."""

import subprocess
import sys

import pytest

from qerl_verl.cli import cluster
from qerl_verl.cli.explain import compose
from qerl_verl.cli.main import main

pytestmark = pytest.mark.usefixtures("gsm8k_files")
FILES = ("data.train_files=data/gsm8k/train.parquet", "data.val_files=data/gsm8k/test.parquet")
MODEL = "actor_rollout_ref.model.path=Qwen/Qwen2.5-0.5B-Instruct"


def explained(capsys, *arguments):
    code = main(["explain", *arguments])
    return code, capsys.readouterr().out.splitlines()


def section(lines, title):
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return lines[start + 1 : lines.index("", start)] if "" in lines[start:] else lines[start + 1 :]


def test_a_recipe(capsys):
    code, lines = explained(capsys, "gsm8k_grpo", "actor_rollout_ref.actor.optim.lr=2e-5")
    assert code == 0 and lines[0] == "gsm8k_grpo on cuda" and lines[-1] == "problems: none"
    changed = section(lines, "set by the recipe and the command line")
    assert "  actor_rollout_ref.actor.optim.lr: 1e-06 -> 2e-05" in changed
    assert "  data.train_batch_size: 1024 -> 128" in changed
    assert not any("val_batch_size" in line for line in changed)
    switch = section(lines, "set by the switch")
    assert "  actor_rollout_ref.actor.strategy: fsdp -> fsdp2 (packed weights are sharded by FSDP2)" in switch
    assert not any("lora_rank" in line for line in switch)
    assert "  qerl.aqn.num_stages: 10" in section(lines, "the switch's own settings")


def test_verls_own_configuration_with_the_switch(capsys):
    code, lines = explained(
        capsys, "ppo_trainer", "+qerl=nvfp4", "algorithm.adv_estimator=grpo", *FILES, MODEL, "--platform", "cpu"
    )
    assert code == 0
    switch = section(lines, "set by the switch")
    assert any(line.startswith("  actor_rollout_ref.model.lora_rank: 0 -> 32 (") for line in switch)
    assert "  trainer.device: cuda -> cpu (no GPU)" in switch


@pytest.mark.parametrize(
    "words",
    [
        "ppo_trainer --platform cpu +qerl=nvfp4 algorithm.adv_estimator=grpo",
        "--platform cpu +qerl=nvfp4 ppo_trainer algorithm.adv_estimator=grpo",
        "+qerl=nvfp4 --platform=cpu ppo_trainer ~trainer.esi_redundant_time algorithm.adv_estimator=grpo",
    ],
)
def test_options_and_overrides_in_any_order(capsys, words):
    code, lines = explained(capsys, *words.split(), *FILES, MODEL)
    assert code == 0 and lines[0] == "ppo_trainer on cpu"
    assert "  algorithm.adv_estimator: gae -> grpo" in lines


@pytest.mark.parametrize("words", ["gsm8k_grpo --nosuch", "gsm8k_grpo --platform tpu"])
def test_an_option_that_there_is_not_is_refused(capsys, words):
    with pytest.raises(SystemExit):
        main(["explain", *words.split()])
    assert words.split()[1] in capsys.readouterr().err


def test_a_key_of_the_users_stays(capsys):
    _, lines = explained(capsys, "gsm8k_grpo", "trainer.n_gpus_per_node=8", "--platform", "cpu")
    assert not any("n_gpus_per_node" in line for line in section(lines, "set by the switch"))


def test_a_recipe_of_the_users(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [ppo_trainer, {qerl: nvfp4}, _self_]\n"
        "hydra: {searchpath: ['pkg://verl.trainer.config']}\n"
        "algorithm: {adv_estimator: rloo}\n"
    )
    code, lines = explained(
        capsys, "mine", *FILES, MODEL, "critic.model.path=" + MODEL.partition("=")[2], "--config-path", str(tmp_path)
    )
    assert code == 0 and "  algorithm.adv_estimator: gae -> rloo" in lines


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["gsm8k_grpo", "trainer.use_v1=False"], "trainer.use_v1=False: QeRL runs on"),
        (["gsm8k_grpo", "qerl.aqn.sigma_start=0"], "qerl.aqn.sigma_start=0: must be above 0"),
        (["gsm8k_grpo_nodes"], "shared: no value yet; add shared=..."),
        (["ppo_trainer"], "the switch is off: add +qerl=nvfp4"),
        (["sft_trainer_engine", "+qerl=nvfp4"], "another program's configuration"),
        (["gsm8k_grpo", "actor_rollout_ref.model.lora_adapter_path=/nowhere"], "no adapter_config.json there"),
        (["gsm8k_grpo", "data.train_files=nowhere.parquet"], "data.train_files=nowhere.parquet: there is no such file"),
        (
            ["gsm8k_grpo", "data.train_batch_size=2000"],
            "data.train_batch_size=2000: the training data has 1024 prompts",
        ),
        (["gsm8k_grpo", "actor_rollout_ref.model.path=/nowhere"], "model.path=/nowhere: there is no such folder"),
    ],
)
def test_problems(capsys, arguments, problem):
    code, lines = explained(capsys, *arguments)
    assert code == 2
    assert any(line.startswith("  - ") and problem in line for line in lines[lines.index("problems:") :])


def test_files_of_another_machine_are_left_out(capsys):
    model = "actor_rollout_ref.model"
    elsewhere = [f"{model}.path=/there/model", f"{model}.lora_adapter_path=/there/adapter"]
    elsewhere += ["data.train_files=/there/a.parquet", "qerl.quantization.calibration=/there/b.parquet"]
    elsewhere += ["trainer.resume_mode=resume_path", "trainer.resume_from_path=/there/run/global_step_1"]
    code, lines = explained(capsys, "gsm8k_grpo", *elsewhere, "--elsewhere")
    assert code == 0 and "not looked at: data, model folders, CPUs, GPUs and Ray (--elsewhere)" in lines
    code, lines = explained(capsys, "gsm8k_grpo")
    assert code == 0 and any(
        "not looked at: Qwen/Qwen2.5-7B-Instruct, which is not on this machine yet; `qerl" in line for line in lines
    )


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["trainer.nnodes=2"], "give the name of a recipe"),
        (["nosuch"], "there is no such recipe in pkg://verl.trainer.config. QeRL's: gsm8k_grpo, "),
        (["mine", "--config-path", "/nowhere"], "--config-path /nowhere: there is no such folder"),
        (["nosuch"], "gsm8k_ppo_8gpu, paper/..., quickstart_cpu, study/.... Give --config-path"),
        (["gsm8k_grpo", "data.nope=1"], "Could not override 'data.nope'"),
        (["ppo_trainer", "+qerl=nvfp4", "data.nope=1"], "refuses it without QeRL's settings, too)"),
        (["ppo_trainer", "+qerl=nvfp4", "qerl.nope=1"], "Could not override 'qerl.nope'"),
        (["gsm8k_grpo", "trainer.nnodes"], "gsm8k_grpo: "),
    ],
)
def test_what_does_not_compose_is_one_line(capsys, arguments, error):
    assert main(["explain", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qerl: ") and err.count("\n") == 1 and error in err
    assert ("without QeRL" in err) == ("data.nope=1" in arguments and "+qerl=nvfp4" in arguments)


def test_a_search_path_from_another_folder_is_named(capsys, tmp_path, monkeypatch):
    """verl's recipes for several turns have this search path."""
    monkeypatch.chdir(tmp_path)
    recipe = "hydra: {searchpath: ['file://verl/trainer/config']}\ndefaults: [ppo_trainer, _self_]\n"
    (tmp_path / "mine.yaml").write_text(recipe)
    assert main(["explain", "mine", "--config-path", str(tmp_path), "+qerl=nvfp4"]) == 2
    assert f"names verl/trainer/config, which is not in {tmp_path}: start where it is" in capsys.readouterr().err


def test_composing_leaves_hydra_as_it_was():
    from hydra.core.global_hydra import GlobalHydra

    compose("gsm8k_grpo", [])
    assert not GlobalHydra.instance().is_initialized()


def test_explain_writes_nothing_and_needs_no_home(tmp_path):
    command = [sys.executable, "-m", "qerl_verl.cli.main", "explain", "gsm8k_grpo"]
    before = sorted(tmp_path.rglob("*"))
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    assert sorted(tmp_path.rglob("*")) == before


# --- qerl cluster ---


def node(name, gpus, alive=True):
    return {"Alive": alive, "NodeManagerHostname": name, "Resources": {"GPU": float(gpus)} if gpus else {}}


def test_waits_until_all_have_joined(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(cluster, "REMARK_SECONDS", 0)
    states = [ConnectionError("not yet"), [node("a", 8)], [node("a", 8), node("b", 0)], [node("a", 8), node("b", 8)]]

    def nodes(address):
        assert address == "here:1"
        state = states.pop(0)
        if isinstance(state, Exception):
            raise state
        return state

    assert cluster.wait_for_cluster(2, 16, 60, "here:1", nodes) == 0
    out, err = capsys.readouterr()
    assert out == "qerl: the Ray cluster is up: 2 of 2 nodes, 16 of 16 GPUs\n" and states == []
    assert "no Ray head answers yet (not yet)" in err and "1 of 2 nodes, 8 of 16 GPUs" in err


def test_says_who_is_missing_when_the_time_is_over(capsys):
    nodes = [node("a", 8), node("b", 8, alive=False)]
    assert cluster.wait_for_cluster(2, 16, 0, None, lambda address: nodes) == 2
    out, err = capsys.readouterr()
    assert out == "" and "not complete after 0 s: 1 of 2 nodes, 8 of 16 GPUs. Nodes that joined: a (8 GPUs)." in err
