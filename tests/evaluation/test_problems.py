"""Tests what --data takes, and what it refuses."""

import json

import pandas
import pytest

from qerl_verl.data.gsm8k import INSTRUCTION
from qerl_verl.data.prompts import prompt_row
from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.evaluation.problems import read_data

ROW = prompt_row("digits", "1+1=", "2", index=0)
RAW = {"question": "How many?", "answer": "Two.\n#### 2"}


def without(*keys, **values):
    return {key: value for key, value in ROW.items() if key not in keys} | values


@pytest.fixture
def write(tmp_path):
    """Returns ``write(name, rows)``: a parquet, JSON or JSONL file. Returns its path."""

    def write(name, rows):
        file = tmp_path / name
        if file.suffix == ".parquet":
            pandas.DataFrame(rows).to_parquet(file)
        elif isinstance(rows, str):
            file.write_text(rows)
        else:
            text = json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n"
            file.write_text(text)
        return file

    return write


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_verls_files(write, name):
    rows = [prompt_row("digits", f"{i}+{i}=", str(2 * i), index=i) for i in range(3)]
    data = read_data(str(write(name, rows)))
    assert data.name.endswith(name)
    for index, (problem, row) in enumerate(zip(data.problems, rows, strict=True)):
        assert problem.index == index and problem.source == "digits"
        assert problem.messages == row["prompt"] and problem.answer == str(2 * index)
        assert problem.extra_info == {"index": index}


@pytest.mark.parametrize(
    "name, raw, text, source, answer",
    [
        ("gsm8k", RAW, f"How many?\n\n{INSTRUCTION}", "openai/gsm8k", "2"),
        ("aime24", {"problem": "How?", "answer": "033"}, None, "aime24", "33"),
        ("math500", {"problem": "How?", "answer": "\\frac12"}, None, "math500", "\\frac12"),
    ],
)
def test_benchmarks_from_their_own_files(write, name, raw, text, source, answer):
    data = read_data(f"{name}={write('raw.jsonl', [raw])}")
    (problem,) = data.problems
    assert (data.name, problem.source, problem.answer) == (name, source, answer)
    assert text is None or problem.messages == [{"role": "user", "content": text}]


def test_the_digest_is_of_all_rows_and_of_all_that_is_read_of_them(write):
    rows = [prompt_row("digits", f"{i}+{i}=", str(2 * i), index=i) for i in range(3)]
    file = str(write("a.jsonl", rows))
    whole, part = read_data(file), read_data(file, limit=2)
    assert len(part.problems) == 2 and part.digest == whole.digest
    for change in ({"data_source": "x"}, {"prompt": [{"role": "user", "content": "?"}]}, {"extra_info": {"index": 9}}):
        assert read_data(str(write("b.jsonl", [*rows[:2], rows[2] | change]))).digest != whole.digest


REFUSED = {
    "no such file": ("missing.parquet", None, "there is no such file"),
    "no such benchmark": ("gsm9k", None, "there is no such file.*gsm8k, math500"),
    "no such file of a benchmark": ("gsm8k=missing.jsonl", None, "there is no file missing.jsonl"),
    "another format": ("a.csv", "a,b\n", "verl reads .parquet, .jsonl, .json"),
    "a broken parquet": ("a.parquet", "", "cannot be read"),
    "a broken line": ("a.jsonl", "{\n", "a.jsonl:1: not JSON"),
    "no rows": ("a.jsonl", [], "no problem in it"),
    "no answers": ("a.parquet", [without("reward_model")], "row 0: no answer"),
    "an answer that is null": ("a.jsonl", [ROW, without(reward_model={"ground_truth": None})], "row 1: no answer"),
    "an answer that is empty": ("a.jsonl", [without(reward_model={"ground_truth": ""})], "row 0: no answer"),
    "another reward_model": ("a.jsonl", [without(reward_model="2")], "row 0: no answer"),
    "no data source": ("a.jsonl", [without("data_source")], "row 0: no `data_source`"),
    "no prompts": ("a.jsonl", [without("prompt")], "no column `prompt`.*--prompt-key"),
    "GSM8K's own file": ("a.jsonl", [RAW], "no column `prompt`.*--data gsm8k=FILE"),
    "a prompt that is text": ("a.jsonl", [without(prompt="1+1=")], "a list of messages"),
    "a message without a role": ("a.jsonl", [without(prompt=[{"content": "?"}])], "a list of messages"),
    "images": ("a.jsonl", [without(images=["x.png"])], "text alone"),
    "a row that is a list": ("a.jsonl", [[1]], "expected an object"),
    "GSM8K without an answer": ("gsm8k=a.jsonl", [{"question": "?", "answer": "Two."}], "must end with `####"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(write, tmp_path, monkeypatch, case):
    given, content, message = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        file = given.rpartition("=")[2]
        (tmp_path / file).write_text("") if content == "" else write(file, content)
    with pytest.raises(EvaluationError, match=message) as error:
        read_data(given)
    assert f"--data {given}" in str(error.value)


def test_a_benchmark_that_cannot_be_fetched_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("qerl_verl.evaluation.problems.read_hub", lambda *a: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(EvaluationError, match=r"--data gsm8k: .*offline.*--data gsm8k=FILE"):
        read_data("gsm8k")


def test_another_column_of_prompts(write):
    row = without("prompt", question=[{"role": "user", "content": "?"}])
    assert read_data(str(write("a.jsonl", [row])), prompt_key="question").problems[0].messages[0]["content"] == "?"
