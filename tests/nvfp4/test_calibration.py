"""Tests which text of a file is used for calibration, and as which tokens."""

import json
from dataclasses import replace

import pandas
import pytest

from qerl_verl.data.prompts import prompt_row, write_parquet
from qerl_verl.nvfp4.calibration import read_calibration
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.quickstart.tiny_model import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(bf16_checkpoint):
    return bf16_checkpoint


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(calibration, tokenizer):
    return [(tokenizer.decode(ids[:begin]), tokenizer.decode(ids[begin:])) for ids, begin in calibration.sequences]


PROMPT = "<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n"
CHAT = [{"role": "user", "content": "3+4?"}]


@pytest.mark.parametrize(
    "row, prompt, answer",
    [
        ({"prompt": CHAT}, "", PROMPT),
        ({"prompt": "3+4?", "extra_info": {"index": 1}}, "", PROMPT),
        ({"prompt": CHAT, "extra_info": {"answer": "7"}}, PROMPT, "7<|im_end|>\n"),
        ({"prompt": CHAT, "extra_info": {"solution": "7"}, "answer": "8"}, PROMPT, "7<|im_end|>\n"),
        ({"prompt": CHAT, "reward_model": {"ground_truth": "7"}}, "", PROMPT),
        ({"question": "3+4?", "answer": "7"}, PROMPT, "7<|im_end|>\n"),
        ({"problem": "3+4?", "solution": ""}, "", PROMPT),
        ({"messages": [*CHAT, {"role": "assistant", "content": "7"}]}, PROMPT, "7<|im_end|>\n"),
        ({"messages": CHAT}, "", PROMPT),
        ({"text": "3+4=7"}, "", "3+4=7"),
    ],
)
def test_rows(model, tokenizer, tmp_path, row, prompt, answer):
    calibration = read_calibration(jsonl(tmp_path / "rows.jsonl", [row] * 3), model)
    assert texts(calibration, tokenizer) == [(prompt, answer)] * 2


def test_prompt_key_and_chat_template(model, tokenizer, tmp_path):
    file = jsonl(tmp_path / "rows.jsonl", [{"chat": CHAT}] * 3)
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    calibration = read_calibration(file, model, prompt_key="chat", chat_template=template)
    assert texts(calibration, tokenizer) == [("", "[3+4?]")] * 2


def test_parquet_of_verl_is_spread_over_its_row_groups(model, tokenizer, tmp_path):
    rows = [prompt_row("sums", f"{i}+0?", str(i), index=i, solution=str(i)) for i in range(1000)]
    write_parquet(rows, tmp_path / "one.parquet")
    pandas.DataFrame(rows).to_parquet(tmp_path / "many.parquet", row_group_size=64)
    one, many = (read_calibration(tmp_path / f"{n}.parquet", model, samples=92) for n in ("one", "many"))
    assert one.sequences == many.sequences and one.key == many.key
    assert len(one.sequences) == 92 and len(one.held_out) == 8
    used = [int(answer.partition("<")[0]) for _, answer in texts(one, tokenizer)]
    apart = [int(tokenizer.decode(ids[begin:]).partition("<")[0]) for ids, begin in one.held_out]
    assert sorted(used + apart) == list(range(0, 1000, 10))
    assert max(apart) - min(apart) > 500  # these are spread as well


def test_several_files_and_few_rows(model, tmp_path):
    files = [jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}{i}"} for i in range(10)]) for n in "ab"]
    calibration = read_calibration(files, model, samples=100)
    assert len(calibration.sequences) == 16 and len(calibration.held_out) == 4


def test_text_file_is_cut(model, tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("0123456789" * 10)
    calibration = read_calibration(tmp_path / "book.txt", model, sample_tokens=10)
    assert texts(calibration, tokenizer) == [("", "0123456789")] * 8 and len(calibration.held_out) == 2


def test_long_rows_are_cut(model, tmp_path):
    """If the answer is cut off entirely, the prompt itself is scored."""
    rows = [{"question": "1" * 30, "answer": "2" * n} for n in (5, 500, 5)]
    calibration = read_calibration(jsonl(tmp_path / "rows.jsonl", rows), model, sample_tokens=20)
    assert [(len(ids), begin) for ids, begin in calibration.sequences] == [(20, 0)] * 2


def test_key_is_that_of_the_content(model, tmp_path):
    rows = [{"text": f"text {i}"} for i in range(8)]
    one = read_calibration(jsonl(tmp_path / "one.jsonl", rows), model)
    (tmp_path / "array.json").write_text(json.dumps(rows))
    assert read_calibration(tmp_path / "array.json", model).key == one.key
    assert read_calibration(tmp_path / "one.jsonl", model, samples=3).key != one.key
    assert replace(one, held_out=one.held_out[:0]).key != one.key
    rows[3]["text"] += "!"
    assert read_calibration(jsonl(tmp_path / "two.jsonl", rows), model).key != one.key


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("none.jsonl", None, "there is no file"),
        ("rows.jsonl", '{"prompt": ', "cannot be read"),
        ("rows.jsonl", "[1, 2]", "expected objects"),
        ("rows.jsonl", '{"unknown": "text"}\n' * 5, "0 usable rows"),
        ("rows.parquet", "not parquet", "cannot be read"),
        ("empty.txt", "", "0 usable rows"),
    ],
)
def test_unusable_files_are_named(model, tmp_path, name, content, named):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=named) as error:
        read_calibration(tmp_path / name, model)
    assert name in str(error.value)


def test_model_without_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        read_calibration(jsonl(tmp_path / "rows.jsonl", [{"text": "a b"}] * 3), tmp_path)


@pytest.mark.parametrize("setting", [{"samples": 0}, {"sample_tokens": 1}])
def test_numbers_out_of_range(model, tmp_path, setting):
    with pytest.raises(CheckpointError, match="at least"):
        read_calibration(tmp_path / "rows.jsonl", model, **setting)
