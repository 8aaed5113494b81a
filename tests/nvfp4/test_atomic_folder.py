"""Tests that a destination is whole or absent after a kill at any moment, and who removes
leftovers."""

import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from qerl_verl.nvfp4.atomic_folder import atomic_folder, settle_leftovers
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.ownership import Owner


@pytest.fixture(scope="module")
def dead():
    process = subprocess.Popen(["true"])
    process.wait()
    return replace(Owner.current(), process=process.pid)


def checkpoint(folder, text):
    folder.mkdir(parents=True)
    (folder / "weights").write_text(text)
    return folder


def content(folder):
    return (folder / "weights").read_text() if folder.is_dir() else None


def attempt(dst, text, replaces):
    with atomic_folder(dst, replace=replaces) as folder:
        (folder / "weights").write_text(text)


def killed(dst, moment):
    """Returns a process that tries to replace ``dst`` and is killed before its call ``moment``."""
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        return
    try:
        calls = []

        def counted(name, call):
            def run(*args, **kwargs):
                calls.append(name)
                if f"{name} {calls.count(name)}" == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return run

        Path.rename, shutil.rmtree = counted("rename", Path.rename), counted("rmtree", shutil.rmtree)
        Path.write_text = counted("write", Path.write_text)
        attempt(dst, "new", replaces=True)
    finally:
        os._exit(1)


@pytest.mark.parametrize(
    ("moment", "left", "after"),
    [
        ("write 1", "old", "old"),  # before the owner is written
        ("write 2", "old", "old"),
        ("rename 1", "old", "old"),
        ("rename 2", None, "old"),  # the old folder is aside, the new one not yet in place
        ("rename 3", "new", "new"),
        ("rmtree 1", "new", "new"),
        ("rmtree 2", "new", "new"),
        ("rmtree 3", "new", "new"),
    ],
)
def test_killed_anywhere_the_old_or_the_new_one_is_there_and_the_next_call_ends_it(tmp_path, moment, left, after):
    dst = checkpoint(tmp_path / "dst", "old")
    killed(dst, moment)
    assert content(dst) == left
    settle_leftovers(dst)
    assert content(dst) == after
    if moment != "write 1":  # a workspace without an owner's name stays
        assert list(tmp_path.iterdir()) == [dst]
    attempt(dst, "newest", replaces=True)
    assert content(dst) == "newest"


def test_an_error_leaves_what_was_there(tmp_path, monkeypatch):
    dst = checkpoint(tmp_path / "dst", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(dst, replace=True) as folder:
        raise KeyboardInterrupt
    assert content(dst) == "old" and list(tmp_path.iterdir()) == [dst] and not folder.exists()
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "content":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attempt(dst, "new", replaces=True)
    assert content(dst) == "old" and list(tmp_path.iterdir()) == [dst]


def workspace(dst, owner, **folders):
    made = dst.with_name(f"{dst.name}.tmp-12345678")
    made.mkdir()
    if owner:
        owner.write(made / "owner")
    for name, text in folders.items():
        checkpoint(made / name, text)
    return made


@pytest.mark.parametrize("occupied", [False, True])
def test_something_else_stands_there_by_now(tmp_path, dead, capsys, occupied):
    """The attempt that had moved the old folder aside did not finish, so nothing is removed."""
    dst = tmp_path / "dst"
    left = workspace(dst, dead, content="new", replaced="old")
    if occupied:
        checkpoint(dst, "someone else's")
    settle_leftovers(dst)
    if occupied:
        assert content(dst) == "someone else's" and content(left / "replaced") == "old"
        assert f"{left / 'replaced'} is what stood at {dst}" in capsys.readouterr().err
    else:
        assert content(dst) == "old" and not left.exists()


NOT_HERE = [
    *({"host": "another-node"}, {"boot": "11111111-2222-3333-4444-555555555555"}, {"namespaces": "pid:[4026532999]"}),
    *({"boot": ""}, None),
]


@pytest.mark.parametrize("elsewhere", NOT_HERE)
def test_what_cannot_be_judged_stays_and_is_named(tmp_path, dead, capsys, elsewhere):
    dst = tmp_path / "dst"
    left = workspace(dst, None if elsewhere is None else replace(dead, **elsewhere), content="half", replaced="old")
    os.utime(left, (0, 0))  # however old
    attempt(dst, "new", replaces=False)
    assert content(dst) == "new" and content(left / "content") == "half" and content(left / "replaced") == "old"
    err = capsys.readouterr().err
    assert f"{left} is left as it is" in err and f"{left / 'replaced'} is what stood at {dst}" in err


def test_what_is_alive_or_has_another_name_stays(tmp_path, dead):
    dst = tmp_path / "dst"
    living = workspace(dst, Owner.current(), content="half")
    other = workspace(tmp_path / "dst2", dead, content="half")
    (tmp_path / "dst.tmp-mine").write_text("a file")
    (tmp_path / "dst.tmp-notes").mkdir()
    settle_leftovers(dst)
    assert len(list(tmp_path.iterdir())) == 4 and living.exists() and other.exists()


def test_a_name_with_brackets_means_itself(tmp_path, dead):
    one, two = tmp_path / "d[12]", tmp_path / "d1"
    of_one, of_two = workspace(one, dead, content="half"), workspace(two, dead, content="half")
    settle_leftovers(one)
    assert not of_one.exists() and of_two.exists()


def test_an_absent_or_empty_folder_is_filled_and_another_one_is_not(tmp_path):
    attempt(tmp_path / "a" / "b", "new", replaces=False)
    (tmp_path / "empty").mkdir()
    attempt(tmp_path / "empty", "new", replaces=False)
    assert content(tmp_path / "a" / "b") == content(tmp_path / "empty") == "new"
    with pytest.raises(CheckpointError, match="something else wrote to it meanwhile"):
        attempt(tmp_path / "empty", "newer", replaces=False)
    assert content(tmp_path / "empty") == "new" and len(list(tmp_path.iterdir())) == 2


def test_the_owner_is_written_down(tmp_path):
    with atomic_folder(tmp_path / "dst") as folder:
        assert json.loads((folder.parent / "owner").read_text())["process"] == os.getpid()
