"""Every recipe in the repository composes with the switch and has nothing to refuse."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

import qerl_verl.plugin  # noqa: F401  (makes Hydra find the group, as `import verl` does)
from qerl_verl.config import rules
from qerl_verl.config.settings import QeRLSettings

RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = sorted(p.stem for p in RECIPES.glob("*.yaml"))


def test_there_are_recipes():
    assert {"quickstart_cpu", "gsm8k_grpo"} <= set(NAMES)


@pytest.mark.parametrize("on_cpu", [False, True], ids=["cuda", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_recipe(name, on_cpu, tmp_path):
    overrides = [f"quickstart.out={tmp_path}"] if name == "quickstart_cpu" else []
    with initialize_config_dir(str(RECIPES), version_base=None):
        config = compose(name, overrides=overrides)
    before = config.actor_rollout_ref.actor.optim.lr
    QeRLSettings.from_mapping(config.qerl)
    rules.apply_rules(config, set(), on_cpu=on_cpu, notify=lambda line: None)
    assert rules.find_problems(config) == []
    assert config.actor_rollout_ref.actor.optim.lr == before
    assert config.actor_rollout_ref.model.lora_rank == 32
    batch, mini = config.data.train_batch_size, config.actor_rollout_ref.actor.ppo_mini_batch_size
    assert batch % mini == 0
