"""The data files against batch size, steps and tokenizer: one row a case."""

import json

import pytest

from qerl_verl.config.checks import data
from qerl_verl.data.steps import epochs_for, reachable_steps


@pytest.fixture
def files(tmp_path, monkeypatch, write_prompts):
    """A folder with data, which is the working directory."""
    long = [{"role": "user", "content": "1 + " * 60}]
    for name, count, columns in (
        ("32.parquet", 32, {}),
        ("0.parquet", 0, {}),
        ("bare.parquet", 32, {"prompt": None, "question": ["?"] * 32}),
        ("no_reward.parquet", 32, {"reward_model": None}),
        ("text.parquet", 8, {"prompt": [long] * 7 + [[{"role": "user", "content": "1"}]]}),
        ("part/a.parquet", 16, {}),
        ("part/b.parquet", 16, {}),
    ):
        write_prompts(tmp_path / name, count, **columns)
    (tmp_path / "broken.parquet").write_text("nothing")
    (tmp_path / "32.csv").write_text("a,b\n")
    (tmp_path / "4.jsonl").write_text('{"prompt": 1}\n' * 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


BASE = {"data.train_files": "32.parquet", "data.val_files": "32.parquet", "data.train_batch_size": 8}


def configured(composed, settings):
    return composed(*(f"{key}={json.dumps(value)}" for key, value in {**BASE, **settings}.items()))


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
def test_files_that_verl_cannot_train_on(composed, files, settings, expected):
    problems = data.find_problems(configured(composed, settings))
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
        ({"trainer.total_training_steps": 2, "trainer.total_epochs": 1, "data.train_max_samples": 8}, (2, 1, 1, 2)),
        ({"trainer.total_training_steps": 40, "trainer.total_epochs": 1, "data.train_files": "hdfs://a.parquet"}, None),
        ({"trainer.total_training_steps": 40, "trainer.total_epochs": 1, "data.train_batch_size": 64}, None),  # refused
    ],
)
def test_epochs_that_end_before_the_steps_are_told_with_both_numbers(composed, files, settings, expected):
    lines = data.find_remarks(configured(composed, settings))
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


SHORT = {"data.filter_overlong_prompts": True, "data.max_prompt_length": 16}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        (TEMPLATE, SHORT, None),
        (None, SHORT, "its tokenizer has no chat template, which verl makes every prompt with; give one with actor_rollout_ref"),
        (None, {}, "its tokenizer has no chat template"),
        (None, {"actor_rollout_ref.model.custom_chat_template": TEMPLATE}, None),
        (None, {"actor_rollout_ref.rollout.agent.agent_loop_config_path": "mine.yaml"}, None),
        (TEMPLATE, {**SHORT, "data.train_files": "text.parquet"}, "leaves 1 of 8 prompts, fewer than data.train_batch_size=8"),
        (TEMPLATE, {**SHORT, "data.train_files": "text.parquet", "data.train_batch_size": 1}, None),
        (TEMPLATE, {"data.max_prompt_length": 16, "data.train_files": "text.parquet"}, None),  # nothing is dropped
        ("{{ raise_exception('no system role') }}", {}, "the chat template of"),
        ("{{ raise_exception('no system role') }}", SHORT, "fails on the first prompt: no system role"),
    ],
)  # fmt: skip
def test_prompts_that_no_rollout_can_begin_with(
    composed, files, bf16_checkpoint, tmp_path, template, settings, expected
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bf16_checkpoint)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    problems = data.find_prompt_problems(configured(composed, settings), tmp_path / "model")
    assert len(problems) == (expected is not None), problems
    assert expected is None or expected in problems[0]


def test_prompts_are_read_until_one_batch_is_full(composed, files, bf16_checkpoint, monkeypatch):
    """So the check costs what one batch costs, also of a large data set."""
    taken = []
    read = data._prompts
    monkeypatch.setattr(data, "_prompts", lambda *a: (taken.append(p) or p for p in read(*a)))
    assert (
        data.find_prompt_problems(configured(composed, {**SHORT, "data.max_prompt_length": 64}), bf16_checkpoint) == []
    )
    assert len(taken) == 8


def test_verl_still_drops_every_prompt_when_the_template_fails():
    """Why a missing chat template is refused: verl prints the error of each row and takes the row
    for too long."""
    import inspect

    from verl.utils.dataset.rl_dataset import RLHFDataset

    source = inspect.getsource(RLHFDataset.maybe_filter_out_long_prompts)
    assert source.count("return self.max_prompt_length + 1") == 2
