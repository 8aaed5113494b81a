"""Tests the quickstart's problems, its rows as verl reads them, and its reward as verl calls it."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from verl.trainer.ppo.reward import get_custom_reward_fn
from verl.utils.dataset.rl_dataset import RLHFDataset

import qerl_verl.plugin  # noqa: F401  (makes Hydra find the group, as `import verl` does)
from qerl_verl.data.prompts import write_parquet
from qerl_verl.quickstart.arithmetic import DATA_SOURCE, Problem, all_problems, rows, split
from qerl_verl.quickstart.tiny_model import build_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart")
    train, held_out = split(seed=0)
    write_parquet(rows(train), out / "data" / "train.parquet")
    write_parquet(rows(held_out), out / "data" / "validation.parquet")
    with initialize_config_dir(str(RECIPES), version_base=None):
        return compose("quickstart_cpu", overrides=[f"quickstart.out={out}"])


def test_every_answer_is_right_and_no_slip_is():
    for problem in all_problems():
        right = eval(problem.question.removesuffix("="))
        assert problem.answer == str(right)
        assert problem.answer not in problem.slips()
        assert problem.slips() and all(int(s) >= 0 and abs(int(s) - right) in (1, 10) for s in problem.slips())


def test_a_problem_is_in_exactly_one_part():
    train, held_out = split(seed=3)
    assert len(held_out) == 128 and set(train) | set(held_out) == set(all_problems())
    assert len(train) + len(held_out) == len(set(all_problems()))
    assert split(seed=3) == (train, held_out) and split(seed=4) != (train, held_out)


@pytest.mark.parametrize("part", ["train_files", "val_files"])
def test_verl_reads_every_row_and_prompt_and_answer_fit_the_recipe(config, part):
    tokenizer = build_tokenizer()
    problems = split(seed=0)[part == "val_files"]
    dataset = RLHFDataset(config.data[part], tokenizer, config.data)
    assert len(dataset) == len(problems)
    for i, problem in enumerate(problems):
        row = dataset[i]
        assert row["raw_prompt"] == [{"role": "user", "content": problem.question}]
        assert row["data_source"] == DATA_SOURCE and row["index"] == i
        assert row["reward_model"] == {"style": "rule", "ground_truth": problem.answer}
        prompt = tokenizer.apply_chat_template(row["raw_prompt"], add_generation_prompt=True, return_dict=False)
        assert len(prompt) <= config.data.max_prompt_length
        assert len(tokenizer.encode(problem.answer)) + 1 <= config.data.max_response_length


def test_an_epoch_has_at_least_one_batch(config):
    assert len(split(seed=0)[0]) >= config.data.train_batch_size


def test_every_batch_splits_into_whole_micro_batches(config):
    """verl refuses anything else, but only during the first step (engine/utils.py,
    prepare_micro_batches).
    """
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert config.data.train_batch_size * rollout.n % rollout.log_prob_micro_batch_size_per_gpu == 0
    assert actor.ppo_mini_batch_size * rollout.n % actor.ppo_micro_batch_size_per_gpu == 0


def test_the_recipes_reward_is_one_for_exactly_the_right_number(config):
    reward = get_custom_reward_fn(config)
    problem = Problem(12, "+", 9)

    def score(text):
        return reward(data_source=DATA_SOURCE, solution_str=text, ground_truth=problem.answer, extra_info={}, more=1)

    assert [score(t) for t in ("21", "21 ", "\n21")] == [1.0] * 3
    assert [score(t) for t in ("", "2", "211", "12", "021", "21=", "x21", *problem.slips())] == [0.0] * 11


def test_reward_workers_need_no_torch():
    code = "import sys, qerl_verl.quickstart.arithmetic; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
