"""The data files against batch size and steps: one row a case."""

import pytest

from qerl_verl.config.checks import data
from qerl_verl.data.steps import epochs_for, reachable_steps


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"data.train_files": ["part/a.parquet", "part/b.parquet"], "data.train_batch_size": 32}, []),
        ({"data.train_files": "part/*.parquet", "data.train_batch_size": 32}, []),
        ({"data.train_files": "hdfs://there/a.parquet", "data.val_files": "hdfs://there/b.parquet"}, []),
        ({"data.train_files": "4.jsonl", "data.train_batch_size": 4}, []),
        ({"data.custom_cls.path": "mine.py", "data.train_files": "/nowhere"}, []),
        ({"data.train_files": "/no/where.parquet"}, ["data.train_files=/no/where.parquet: there is no such file; give the"]),
        ({"data.val_files": "where.parquet"}, ["data.val_files=where.parquet: there is no such file in {folder}"]),
        ({"data.train_files": ["32.parquet", "b.parquet"]}, ["data.train_files=b.parquet: there is no such file"]),
        ({"data.train_files": "none/*.parquet"}, ["data.train_files=none/*.parquet: there is no such file"]),
        ({"data.train_files": "data/gsm8k/train.parquet"}, ["`python -m qerl_verl.data.gsm8k --out data/gsm8k` makes"]),
        ({"data.train_files": "~/32.parquet"}, ["data.train_files=~/32.parquet: verl does not expand ~; write {folder}/32.parquet"]),
        ({"data.train_files": "~/none.parquet"}, ["data.train_files=~/none.parquet: there is no such file; give the path"]),
        ({"data.train_files": "32.csv"}, ["data.train_files=32.csv: verl reads .parquet, .json, .jsonl files"]),
        ({"data.train_files": "broken.parquet"}, ["data.train_files=broken.parquet: it cannot be read: "]),
        ({"data.train_files": None}, ["data.train_files: no value"]),
        ({"data.train_batch_size": 33}, ["data.train_batch_size=33: the training data has 32 prompts (data.train_files=32.parquet)"]),
        ({"data.train_max_samples": 6}, ["data.train_batch_size=8: the training data has 6 prompts"]),
        ({"data.train_max_samples": 0}, []),
        ({"data.train_files": "4.jsonl"}, ["data.train_batch_size=8: the training data has 4 prompts"]),
        ({"data.train_files": "0.parquet"}, ["data.train_batch_size=8: the training data has 0 prompts"]),
        ({"data.gen_batch_size": 64}, ["data.gen_batch_size=64: the training data has 32 prompts; set it to 8"]),
        ({"data.val_files": "0.parquet"}, ["data.val_files=0.parquet: no prompt in it"]),
        ({"data.train_files": "bare.parquet"}, ["no column prompt (data.prompt_key names another one); it has data_source, reward_model, question"]),
        ({"data.train_files": "bare.parquet", "data.val_files": "bare.parquet", "data.prompt_key": "question"}, []),
        ({"data.train_files": "no_reward.parquet"}, ["no column reward_model (verl's reward managers read it)"]),
        ({"data.train_files": "/a.parquet", "data.val_files": "/b.parquet"}, ["data.train_files=/a", "data.val_files=/b"]),
    ],
)  # fmt: skip
def test_files_that_verl_cannot_train_on(configured, files, settings, expected):
    problems = data.find_problems(configured(settings))
    assert len(problems) == len(expected), problems
    for problem, part in zip(problems, expected, strict=True):
        assert part.format(folder=files) in problem


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"trainer.total_training_steps": 40, "trainer.total_epochs": 1}, (40, 4, 1, 10)),
        ({"trainer.total_training_steps": 13, "trainer.total_epochs": 3}, (13, 12, 3, 4)),
        ({"trainer.total_training_steps": 12, "trainer.total_epochs": 3}, None),
        ({"trainer.total_epochs": 1}, None),
        (
            {
                "trainer.total_training_steps": 2,
                "trainer.total_epochs": 1,
                "data.train_max_samples": 8,
            },
            (2, 1, 1, 2),
        ),
        (
            {
                "trainer.total_training_steps": 40,
                "trainer.total_epochs": 1,
                "data.train_files": "hdfs://a.parquet",
            },
            None,
        ),
        (
            {
                "trainer.total_training_steps": 40,
                "trainer.total_epochs": 1,
                "data.train_batch_size": 64,
            },
            None,
        ),  # refused
    ],
)
def test_epochs_that_end_before_the_steps_are_told_with_both_numbers(configured, files, settings, expected):
    lines = data.find_remarks(configured(settings))
    if expected is None:
        assert lines == []
    else:
        wanted, reachable, epochs, fix = expected
        (line,) = lines
        assert line.startswith(
            f"trainer.total_training_steps={wanted}, but the training data ends after {reachable} steps"
        )
        assert f"(trainer.total_epochs={epochs})" in line and line.endswith(f"set trainer.total_epochs={fix}")


def test_steps_of_a_data_set():
    assert [reachable_steps(n, 8, 2) for n in (7, 8, 33)] == [0, 2, 8]
    assert [epochs_for(5, n, 8) for n in (7, 8, 33)] == [0, 5, 2]
