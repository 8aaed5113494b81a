"""Tests that every recipe in the repository composes with the switch and is not refused."""

import copy
import functools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import qerl_verl.plugin  # noqa: F401  (makes Hydra find the group, as `import verl` does)
from qerl_verl.cli.explain import recipes
from qerl_verl.config import rules
from qerl_verl.config.checks import arms, recipe
from qerl_verl.config.draft import Draft
from qerl_verl.config.settings import QeRLSettings
from qerl_verl.recipes.study.runs import ARMS

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = recipes()
PAPER = [name for name in NAMES if name.startswith("gsm8k_grpo")]
TABLE_1 = {
    "bf16_untrained": "bf16",
    "nvfp4_untrained": "nvfp4",
    "bf16_full": None,
    "bf16_lora": "bf16",
    "nf4_lora": "nf4",
    "mxfp4_lora": "mxfp4",
    "nvfp4_lora": "nvfp4",
    "nvfp4_lora_aqn": "nvfp4",
}
TABLE_2 = {row: TABLE_1[row] for row in ("bf16_full", "bf16_lora", "nvfp4_lora", "nvfp4_lora_aqn")}
ROWS = {f"paper/table1_{size}_{row}": arm for row, arm in TABLE_1.items() for size in ("3b", "7b")}
ROWS |= {f"paper/table2_{size}_{row}": arm for row, arm in TABLE_2.items() for size in ("7b", "14b", "32b")}
"""The rows of the paper's tables and their arms; None is stock verl."""
SWITCHED = [name for name in NAMES if ROWS.get(name, "nvfp4") is not None]


@functools.cache
def composed(name, *overrides):
    needed = {"quickstart_cpu": ["quickstart.out=/nowhere"], "gsm8k_grpo_nodes": ["shared=/shared"]}
    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose(name, overrides=[*needed.get(name, []), *overrides])


def load(name, *overrides):
    """Returns a copy of the composed recipe."""
    return copy.deepcopy(composed(name, *overrides))


def prepare(name, on_cpu):
    """Returns the configuration and problems after the rules of the switch."""
    config = load(name)
    QeRLSettings.from_mapping(OmegaConf.to_container(config.qerl, resolve=True))
    rules.apply_rules(Draft(config), set(), on_cpu=on_cpu)
    return config, recipe.find_problems(config) + arms.find_problems(
        config, {}, installed=lambda package: {"vllm": "0.24.0"}.get(package, "0.50")
    )


def test_the_recipes():
    assert {name for name in NAMES if name.startswith("paper/")} == set(ROWS)
    assert {name for name in NAMES if name.startswith("study/")} == {f"study/{arm}" for arm in ARMS}
    assert {name for name in NAMES if "/" not in name} == {
        "quickstart_cpu",
        "gsm8k_grpo",
        "gsm8k_grpo_32b",
        "gsm8k_grpo_8gpu",
        "gsm8k_grpo_nodes",
        "gsm8k_ppo_8gpu",
    }
    assert {p.stem for p in RECIPES.glob("*.yaml")} == {*(n for n in NAMES if "/" not in n), "gsm8k_common", "kuberay"}
    parts = {"table1_common", "table2_common", "full_common", "untrained_common"}
    assert {p.stem for p in (RECIPES / "paper").glob("*.yaml")} == {*(n.partition("/")[2] for n in ROWS), *parts}


@pytest.mark.parametrize(("name", "on_cpu"), [(n, c) for n in SWITCHED for c in (False, True) if "/" not in n or not c])
def test_nothing_to_refuse(name, on_cpu):
    rate = load(name).actor_rollout_ref.actor.optim.lr
    config, problems = prepare(name, on_cpu)
    assert problems == []
    assert config.actor_rollout_ref.actor.optim.lr == rate
    assert config.actor_rollout_ref.model.lora_rank == 32


def test_the_gpus_of_a_node_can_be_divided_between_actor_and_rollout():
    """Applies the command in the recipe's head."""
    head = (RECIPES / "gsm8k_grpo_8gpu.yaml").read_text().partition("defaults:")[0]
    overrides = [word for word in head.partition("Four GPUs")[2].split() if "=" in word]
    config = load("gsm8k_grpo_8gpu", *overrides)
    rules.apply_rules(Draft(config), set(), on_cpu=False)
    assert recipe.find_problems(config) == [] and config.trainer.v1.trainer_mode == "qerl_separate_async"
    rollout = config.actor_rollout_ref.rollout
    assert config.trainer.n_gpus_per_node == rollout.n_gpus_per_node * rollout.nnodes == 4


@pytest.mark.parametrize("name", NAMES)
def test_verl_takes_the_batch_sizes(name, bf16_checkpoint):
    """Calls verl's own check, which main_ppo runs before it starts the workers."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = prepare(name, on_cpu=name == "quickstart_cpu")[0] if name in SWITCHED else load(name)
    # verl reads the critic's config.json
    for model in (config.actor_rollout_ref.model, config.critic.model):
        model.path = str(bf16_checkpoint)
    validate_config(config, need_reference_policy(config), need_critic(config))
    gpus = config.trainer.nnodes * config.trainer.n_gpus_per_node
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    assert batch % mini == 0
    assert mini * config.actor_rollout_ref.rollout.n % gpus == 0
    longest = config.data.max_prompt_length + config.data.max_response_length
    if config.actor_rollout_ref.actor.use_dynamic_bsz:
        assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= longest


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    """The settings are those of arXiv 2510.11696, table 4 and appendix E."""
    config = load(name)
    actor, rollout, aqn = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.qerl.aqn
    assert (config.data.train_batch_size, rollout.n, rollout.temperature) == (128, 8, 1.0)
    assert config.data.train_batch_size / actor.ppo_mini_batch_size == 4
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.use_kl_loss, actor.entropy_coeff) == (
        0.2,
        0.28,
        False,
        0,
    )
    assert actor.optim.lr == 1e-5
    assert (aqn.enable, aqn.sigma_start, aqn.sigma_end, aqn.num_stages) == (True, 1e-2, 5e-4, 10)
    assert config.trainer.total_training_steps == 600
    assert config.trainer.total_epochs * (7473 // config.data.train_batch_size) >= 600


@pytest.mark.parametrize("name", [n for n in NAMES if n != "quickstart_cpu" and not n.endswith("untrained")])
def test_a_second_start_goes_on_from_the_last_checkpoint(name):
    trainer = load(name).trainer
    assert trainer.resume_mode == "auto" and trainer.save_freq > 0


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_of_the_papers_tables(name):
    """The rows are those of arXiv 2510.11696, tables 1, 2 and 4; recipes/paper/README.md explains
    which of its contradictory values are used.
    """
    config, arm = load(name), ROWS[name]
    table, size, row = name.removeprefix("paper/").split("_", 2)
    model, actor, rollout = (
        config.actor_rollout_ref.model,
        config.actor_rollout_ref.actor,
        config.actor_rollout_ref.rollout,
    )
    assert model.path == f"Qwen/Qwen2.5-{size.upper()}-Instruct"
    assert config.trainer.experiment_name == name.removeprefix("paper/")
    if arm is None:
        assert "qerl" not in config and model.lora_rank == 0
    else:
        assert config.qerl.arm == arm and config.qerl.aqn.enable is row.endswith("aqn") and model.lora_rank == 32
        aqn = config.qerl.aqn
        assert (aqn.sigma_start, aqn.sigma_end, aqn.num_stages) == (1e-2, 5e-4, 10)
    assert bool(config.trainer.get("val_only")) is row.endswith("untrained")
    if not row.endswith("untrained"):
        assert actor.optim.lr == {"bf16_full": 1e-6, "bf16_lora": 5e-6}.get(row, 1e-5)
    first = table == "table1"
    assert (config.data.train_batch_size, rollout.n) == (128, 8 if first else 16)
    assert config.data.train_batch_size / actor.ppo_mini_batch_size == (4 if first else 1)
    assert config.data.max_response_length == (4096 if first else 8192)
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.use_kl_loss, actor.entropy_coeff) == (
        0.2,
        0.28,
        False,
        0,
    )
    assert (rollout.temperature, rollout.val_kwargs.temperature, rollout.val_kwargs.top_p) == (1.0, 0.6, 0.95)
    if not first:
        level = "level_4_5" if size == "32b" else "level_3_4_5"
        assert config.data.train_files == f"data/bigmath/{level}.parquet"
        assert config.algorithm.filter_groups.enable and actor.loss_agg_mode == "token-mean"
        assert config.reward.custom_reward_function.path == "pkg://qerl_verl.data.math_score"


def test_the_readme_names_every_row():
    text = (RECIPES / "paper" / "README.md").read_text()
    for table, sizes, rows in ((1, "3b,7b", TABLE_1), (2, "7b,14b,32b", TABLE_2)):
        assert all(f"`table{table}_{{{sizes}}}_{row}`" in text for row in rows)


def test_everything_of_a_run_on_several_nodes_lies_in_the_shared_folder():
    config = load("gsm8k_grpo_nodes")
    paths = config.qerl.cache_dir, config.data.train_files, config.data.val_files, config.trainer.default_local_dir
    assert all(path.startswith("/shared/") for path in paths)
