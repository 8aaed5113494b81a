"""Tests the arguments of ``qerl eval``."""

import argparse
from pathlib import Path

import pytest

from qerl_verl.cli.evaluate import add_eval, read_settings
from qerl_verl.cli.main import main
from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.evaluation.run import EvaluationSettings


def parse(*words):
    parser = argparse.ArgumentParser()
    add_eval(parser.add_subparsers(), argparse.ArgumentParser(add_help=False))
    return read_settings(parser.parse_args(["eval", "M", "--data", "gsm8k", *words]))


def test_the_defaults_are_those_of_the_settings():
    expected = EvaluationSettings("M", ["gsm8k"], Path("responses.jsonl"), adapters=[], ks=[1])
    assert parse() == expected
    assert (expected.temperature, expected.top_p, expected.max_tokens) == (0.6, 0.95, 4096)


def test_lists_may_be_given_in_one_piece_or_several():
    settings = parse("d.parquet", "--adapter", "a", "b", "--adapter", "c", "--data", "e.jsonl", "--k", "1", "8")
    assert settings.adapters == ["a", "b", "c"]
    assert settings.data == ["gsm8k", "d.parquet", "e.jsonl"] and settings.ks == [1, 8]


@pytest.mark.parametrize(
    "words, file",
    [
        ((), "responses.jsonl"),
        (("--json", "out/x.json"), "out/x.responses.jsonl"),
        (("--json", "-"), "responses.jsonl"),
        (("--json", "x.json", "--responses", "y.jsonl"), "y.jsonl"),
    ],
)
def test_where_the_responses_go(words, file):
    assert parse(*words).responses == Path(file)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--chat-template-args", "{"), "give a JSON object"),
        (("--chat-template-args", "[]"), "not an object"),
        (("--quantize", "gptq"), "needs a calibration text"),
        (("--quantize", "rtn", "--calibration", "f"), "give both, or neither"),
        (("--calibration", "f"), "give both, or neither"),
    ],
)
def test_refused(words, message):
    with pytest.raises(EvaluationError, match=message):
        parse(*words)


def test_a_problem_ends_in_one_line_and_exit_code_2(tmp_path, capsys):
    missing = str(tmp_path / "missing")
    assert main(["eval", missing, "--data", f"{missing}.parquet"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("qerl: ") and err.count("\n") == 1 and "there is no such file" in err
    assert main(["eval", missing, "--data", "gsm8k", "--chat-template", missing]) == 2
    assert missing in capsys.readouterr().err
