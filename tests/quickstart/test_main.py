"""Tests which folder ``python -m qerl_verl.quickstart --out`` accepts, and what it replaces
there."""

import os
import subprocess
from dataclasses import replace

import pytest

from qerl_verl.ownership import Owner
from qerl_verl.quickstart import __main__ as quickstart


@pytest.fixture(scope="module")
def dead():
    process = subprocess.Popen(["true"])
    process.wait()
    return replace(Owner.current(), process=process.pid)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the quickstart in ``tmp_path / "out"``. The run makes one file and checks that it holds
    the folder.
    """

    def made(out, seed, overrides):
        assert Owner.read(out / quickstart.MARKER) == Owner.current()
        (out / "train.log").write_text("new")
        if overrides:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(quickstart, "quickstart", made)
    return lambda *overrides: quickstart.main(["--out", str(tmp_path / "out"), *overrides])


def fill(out, owner):
    """Makes a folder with a log, a model, a user's file, and a marker that names ``owner`` (None:
    no marker).
    """
    (out / "model").mkdir(parents=True)
    for name in ("train.log", "model/config.json", "notes.txt"):
        (out / name).write_text("old")
    if owner is not None:
        owner.write(out / quickstart.MARKER) if owner else (out / quickstart.MARKER).touch()
    return out


ENDED, NO_MARKER = False, None


@pytest.mark.parametrize(
    ("owner", "refused"),
    [
        (NO_MARKER, "no quickstart made it"),  # a file named train.log proves nothing
        ({}, "runs in it"),
        ({"host": "another-node"}, "may still run in it"),
        ({"namespaces": "pid:[4026532999]"}, "may still run in it"),
        (ENDED, None),
        ("dead", None),
    ],
)
def test_only_an_ended_quickstarts_files_are_replaced(tmp_path, run, dead, capsys, owner, refused):
    owner = dead if owner == "dead" else replace(Owner.current(), **owner) if isinstance(owner, dict) else owner
    out = fill(tmp_path / "out", owner)
    if refused:
        with pytest.raises(SystemExit) as ended:
            run()
        assert ended.value.code == 2 and refused in capsys.readouterr().err
        assert (out / "train.log").read_text() == (out / "model" / "config.json").read_text() == "old"
    else:
        assert run() == 0
        assert (out / "train.log").read_text() == "new" and not (out / "model").exists()
    assert (out / "notes.txt").read_text() == "old"


def test_absent_and_empty_folders_serve_and_every_end_lets_go_of_them(tmp_path, run):
    assert run() == run() == 0
    with pytest.raises(KeyboardInterrupt):
        run("fail=1")
    assert run() == 0
    assert sorted(os.listdir(tmp_path / "out")) == [quickstart.MARKER, "train.log"]


def test_a_link_in_it_is_removed_and_what_it_points_to_stays(tmp_path, run):
    out = fill(tmp_path / "out", ENDED)
    (tmp_path / "precious").mkdir()
    (out / "cache").symlink_to(tmp_path / "precious")
    assert run() == 0
    assert (tmp_path / "precious").is_dir() and not (out / "cache").is_symlink()


def test_a_file_is_no_folder(tmp_path, run, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit):
        run()
    assert (tmp_path / "out").read_text() == "mine"
