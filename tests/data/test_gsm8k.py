"""Tests that verl's own function scores every row of GSM8K that the script writes."""

import json
import os
from pathlib import Path

import pandas
import pytest
from verl.utils.reward_score import default_compute_score

from qerl_verl.data.gsm8k import INSTRUCTION, final_answer, main

TRAIN = [
    {"question": "Ann has 3 bags of 4 nuts. How many nuts?", "answer": "3 * 4 = <<3*4=12>>12 nuts.\n#### 12"},
    {"question": "A house costs 1,000 and 250 more. What is paid?", "answer": "1000 + 250 = 1250\n#### 1,250"},
    {"question": "It is 3 degrees and falls by 8. How cold is it? ", "answer": "3 - 8 = -5\n#### -5"},
]
TEST = [{"question": "Half of 5?", "answer": "5 / 2 = <<5/2=2.5>>2.5\n#### 2.5"}]


def write(folder: Path, **files) -> Path:
    for name, examples in files.items():
        text = "\n".join(e if isinstance(e, str) else json.dumps(e) for e in examples)
        (folder / f"{name}.jsonl").write_text(text + "\n")
    return folder


def convert(source: Path, out: Path) -> tuple[list[dict], list[dict]]:
    assert main(["--local-dir", str(source), "--out", str(out)]) == 0
    return tuple(pandas.read_parquet(out / f"{name}.parquet").to_dict("records") for name in ("train", "test"))


def score(row: dict, response: str) -> float:
    return default_compute_score(row["data_source"], response, row["reward_model"]["ground_truth"])


def test_verl_scores_a_right_answer_one_and_a_wrong_one_zero(tmp_path):
    train, test = convert(write(tmp_path, train=TRAIN, test=TEST), tmp_path / "out")
    assert [r["reward_model"]["ground_truth"] for r in train + test] == ["12", "1250", "-5", "2.5"]
    for row, example in zip(train + test, TRAIN + TEST, strict=True):
        assert score(row, example["answer"]) == 1
        assert score(row, example["answer"] + "1") == 0
        assert score(row, example["answer"].split("####")[0]) == 0


def test_a_prompt_is_one_user_turn_that_asks_for_the_answer_after_the_mark(tmp_path):
    train, _ = convert(write(tmp_path, train=TRAIN, test=TEST), tmp_path / "out")
    (turn,) = train[2]["prompt"]
    assert turn == {"role": "user", "content": f"{TRAIN[2]['question'].strip()}\n\n{INSTRUCTION}"}
    assert "####" in INSTRUCTION
    assert train[2]["extra_info"] == {"split": "train", "index": 2, "solution": TRAIN[2]["answer"]}


def test_blank_lines_are_no_problems(tmp_path):
    train, _ = convert(write(tmp_path, train=[TRAIN[0], "", TRAIN[1]], test=TEST), tmp_path / "out")
    assert len(train) == 2


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{broken", "not JSON"),
        ('["a", "b"]', "expected an object with `question` and `answer`, got list"),
        ({"question": "Why?"}, "`answer` must be a text"),
        ({"question": " ", "answer": "#### 1"}, "`question` must be a text"),
        ({"question": "How many?", "answer": "It is 4."}, "must end with `#### <number>`"),
        ({"question": "How many?", "answer": "#### four"}, "must end with `#### <number>`"),
        ({"question": "How many?", "answer": "#### 4\nor 5"}, "must end with `#### <number>`"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written_for_it(tmp_path, capsys, line, complaint):
    source = write(tmp_path, train=[TRAIN[0], line], test=TEST)
    assert main(["--local-dir", str(source), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"{source / 'train.jsonl'}:2: " in error and complaint in error
    assert not (tmp_path / "out" / "train.parquet").exists()


def test_the_same_data_are_written_again_and_other_data_are_kept(tmp_path, capsys):
    source, out = write(tmp_path, train=TRAIN, test=TEST), tmp_path / "out"
    convert(source, out)
    train, _ = convert(source, out)
    assert len(train) == len(TRAIN)
    for content in (b"mine", b""):
        (out / "train.parquet").write_bytes(content)
        assert main(["--local-dir", str(source), "--out", str(out)]) == 1
        assert "train.parquet exists and holds other data; choose another folder" in capsys.readouterr().err
        assert (out / "train.parquet").read_bytes() == content
    pandas.DataFrame({"data_source": ["mine"], "prompt": ["p"], "reward_model": ["r"]}).to_parquet(
        out / "train.parquet"
    )
    assert main(["--local-dir", str(source), "--out", str(out)]) == 1
    assert sorted(p.name for p in out.iterdir()) == ["test.parquet", "train.parquet"]


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["--local-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "train.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("#### 7", "7"),
        ("a\n#### 1,234,567 \n", "1234567"),
        ("#### 2\n#### 3", "3"),
        ("#### 1.5.2", None),
        ("#### -", None),
    ],
)
def test_final_answer(solution, answer):
    assert final_answer(solution) == answer


@pytest.mark.skipif(
    "QERL_GSM8K" not in os.environ, reason="QERL_GSM8K does not name a folder with train.jsonl and test.jsonl"
)
def test_all_of_gsm8k(tmp_path):
    train, test = convert(Path(os.environ["QERL_GSM8K"]), tmp_path)
    assert (len(train), len(test)) == (7473, 1319)
    for row in train + test:
        assert score(row, row["extra_info"]["solution"]) == 1
