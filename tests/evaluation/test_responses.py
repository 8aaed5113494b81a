"""Tests that the file of responses survives an interruption, and belongs to one evaluation."""

import json
import subprocess
import sys

import pytest

from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.evaluation.responses import Response, ResponseFile

SETTINGS = {"MODEL": "abc", "--temperature": 0.6, "--chat-template-args": {"a": [1]}}


def response(index=0, sample=0, **values):
    fields = dict(policy="base", data="d", index=index, sample=sample, seed=1, score=1.0, tokens=3, finish="stop")
    return Response(**{**fields, "text": "é\n#### 2\u2028", "details": {}, **values})


@pytest.fixture
def path(tmp_path):
    with ResponseFile(tmp_path / "new" / "r.jsonl", SETTINGS) as file:
        for index in range(3):
            file.add(response(index))
    return file.path


def test_what_was_written_is_there_again(path):
    with ResponseFile(path, SETTINGS) as file:
        assert list(file.done.values()) == [response(index) for index in range(3)]
        file.add(response(3))
    assert len(path.read_text().splitlines()) == 5


def test_a_response_is_on_disk_when_add_returns(tmp_path):
    file = ResponseFile(tmp_path / "r.jsonl", SETTINGS)
    file.add(response())
    assert len((tmp_path / "r.jsonl").read_bytes().splitlines()) == 2
    file.close()


@pytest.mark.parametrize("cut", range(1, 60))
def test_a_last_line_that_was_cut_off_is_written_again(path, cut):
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    with ResponseFile(path, SETTINGS) as file:
        assert list(file.done) == [("base", "d", index, 0) for index in range(2)]
        file.add(response(2))
    assert path.read_bytes() == content


@pytest.mark.parametrize("kept", [0, 1, 20])
def test_a_file_that_ends_in_its_first_line(path, kept):
    path.write_bytes(path.read_bytes()[:kept])
    with ResponseFile(path, {**SETTINGS, "--temperature": 1.0}) as file:
        assert not file.done
    assert json.loads(path.read_text()) == {"settings": {**SETTINGS, "--temperature": 1.0}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--temperature": 1.0}, "--temperature was 0.6 and is 1.0"),
        ({"MODEL": "abd"}, "MODEL was abc and is abd"),
        ({"--chat-template-args": {}}, "--chat-template-args was"),
    ],
)
def test_a_changed_setting_is_refused_by_name_and_nothing_changes(path, change, message):
    before = path.read_bytes()
    with pytest.raises(EvaluationError, match=message) as error:
        ResponseFile(path, {**SETTINGS, **change})
    assert "--responses" in str(error.value) and str(error.value).count(" was ") == 1
    assert path.read_bytes() == before


def test_a_new_setting_is_kept(path):
    with ResponseFile(path, {**SETTINGS, "--adapter a": "1"}):
        pass
    with ResponseFile(path, SETTINGS) as file:
        assert len(file.done) == 3
    with pytest.raises(EvaluationError, match="--adapter a was 1 and is 2"):
        ResponseFile(path, {**SETTINGS, "--adapter a": "2"})


@pytest.mark.parametrize("line", ["{", "[]", '{"policy": "base"}', "null", '{"more": 1}'])
def test_a_line_that_is_no_response_is_refused_by_number(path, line):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(EvaluationError, match=r"r\.jsonl:3: "):
        ResponseFile(path, SETTINGS)


@pytest.mark.parametrize(
    "content",
    [
        b"notes without an end of the line",
        b"notes\nof two lines",
        b'{"a": 1}\n{"a": 2',
        b'{"settings": 3}\n',
        b"\n",
        b"\x93NUMPY\x01\x00",
    ],
)
def test_a_file_of_another_kind_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "mine"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match="mine is no file of responses, and was not changed"):
        ResponseFile(path, SETTINGS)
    assert path.read_bytes() == content


def test_one_process_at_a_time(path):
    code = (
        "import sys; from pathlib import Path; from qerl_verl.evaluation.responses import ResponseFile\n"
        "try: ResponseFile(Path(sys.argv[1]), {})\nexcept ValueError as error: print(error)"
    )
    with ResponseFile(path, SETTINGS):
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert "another process writes it" in done.stdout
