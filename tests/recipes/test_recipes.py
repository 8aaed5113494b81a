"""Every recipe in the repository composes with the switch and has nothing to refuse."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import qerl_verl.plugin  # noqa: F401  (makes Hydra find the group, as `import verl` does)
from qerl_verl.cli.explain import recipes
from qerl_verl.config import rules
from qerl_verl.config.checks import recipe
from qerl_verl.config.settings import QeRLSettings

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = recipes()
PAPER = [name for name in NAMES if name.startswith("gsm8k_grpo")]


def load(name, *overrides):
    needed = {"quickstart_cpu": ["quickstart.out=/nowhere"], "gsm8k_grpo_nodes": ["shared=/shared"]}
    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose(name, overrides=[*needed.get(name, []), *overrides])


def prepare(name, on_cpu):
    """Configuration and problems after the rules of the switch."""
    config = load(name)
    QeRLSettings.from_mapping(OmegaConf.to_container(config.qerl, resolve=True))
    rules.apply_rules(config, set(), on_cpu=on_cpu, notify=lambda line: None)
    return config, recipe.find_problems(config)


def test_the_recipes():
    assert set(NAMES) == {
        "quickstart_cpu",
        "gsm8k_grpo",
        "gsm8k_grpo_32b",
        "gsm8k_grpo_8gpu",
        "gsm8k_grpo_nodes",
        "gsm8k_ppo_8gpu",
    }
    assert {p.stem for p in RECIPES.glob("*.yaml")} == {*NAMES, "gsm8k_common", "kuberay"}


@pytest.mark.parametrize("on_cpu", [False, True], ids=["cuda", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_refuse(name, on_cpu):
    rate = load(name).actor_rollout_ref.actor.optim.lr
    config, problems = prepare(name, on_cpu)
    assert problems == []
    assert config.actor_rollout_ref.actor.optim.lr == rate
    assert config.actor_rollout_ref.model.lora_rank == 32


def test_the_gpus_of_a_node_can_be_divided_between_actor_and_rollout():
    """The command in the recipe's head."""
    head = (RECIPES / "gsm8k_grpo_8gpu.yaml").read_text().partition("defaults:")[0]
    overrides = [word for word in head.partition("Four GPUs")[2].split() if "=" in word]
    config = load("gsm8k_grpo_8gpu", *overrides)
    rules.apply_rules(config, set(), on_cpu=False, notify=lambda line: None)
    assert recipe.find_problems(config) == [] and config.trainer.v1.trainer_mode == "qerl_separate_async"
    rollout = config.actor_rollout_ref.rollout
    assert config.trainer.n_gpus_per_node == rollout.n_gpus_per_node * rollout.nnodes == 4


@pytest.mark.parametrize("name", NAMES)
def test_verl_takes_the_batch_sizes(name, bf16_checkpoint):
    """verl's own check, which main_ppo runs before it starts the workers."""
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config, _ = prepare(name, on_cpu=name == "quickstart_cpu")
    for model in (config.actor_rollout_ref.model, config.critic.model):  # verl reads the critic's config.json
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
    """arXiv 2510.11696, table 4 and appendix E."""
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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "quickstart_cpu"])
def test_a_second_start_goes_on_from_the_last_checkpoint(name):
    trainer = load(name).trainer
    assert trainer.resume_mode == "auto" and trainer.save_freq > 0


def test_everything_of_a_run_on_several_nodes_lies_in_the_shared_folder():
    config = load("gsm8k_grpo_nodes")
    paths = config.qerl.cache_dir, config.data.train_files, config.data.val_files, config.trainer.default_local_dir
    assert all(path.startswith("/shared/") for path in paths)
