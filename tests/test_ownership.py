"""Tests which process made a file, and when that process counts as dead."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from qerl_verl import ownership
from qerl_verl.ownership import Owner, state_of


@pytest.fixture(scope="module")
def gone():
    """Returns the number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


HERE = {}
OTHER_HOST = {"host": "another-node"}
OTHER_BOOT = {"boot": "11111111-2222-3333-4444-555555555555"}
OTHER_CONTAINER = {"namespaces": "pid:[4026532999]"}
SYSTEM_SAYS_NOTHING = {"boot": "", "namespaces": ""}


@pytest.mark.parametrize(
    ("where", "lives", "expected"),
    [
        (HERE, True, "alive"),
        (HERE, False, "dead"),
        (OTHER_HOST, True, "unknown"),
        (OTHER_HOST, False, "unknown"),
        (OTHER_BOOT, False, "unknown"),  # perhaps another machine of the same name
        (OTHER_CONTAINER, True, "unknown"),
        (OTHER_CONTAINER, False, "unknown"),
        (SYSTEM_SAYS_NOTHING, False, "unknown"),
        ({"start": ""}, True, "unknown"),
        ({"start": "1"}, True, "dead"),  # the number belongs to another process
    ],
)
def test_state(gone, where, lives, expected):
    process = {} if lives else {"process": gone}
    assert replace(Owner.current(), **process, **where).state() == expected


@pytest.mark.parametrize("field", ["boot_id", "namespaces"])
def test_where_this_system_does_not_tell_nothing_is_judged(gone, monkeypatch, field):
    owner = replace(Owner.current(), process=gone)
    monkeypatch.setattr(ownership, {"boot_id": "_boot", "namespaces": "_namespaces"}[field], lambda: "")
    assert owner.state() == "unknown"
    assert replace(Owner.current(), process=gone).state() == "unknown"  # empty fields prove nothing


def test_a_process_that_proc_hides_is_not_taken_for_dead(monkeypatch):
    """Other users' processes have no folder in /proc there (proc(5), hidepid)."""
    owner = Owner.current()
    monkeypatch.setattr(ownership, "_stat", lambda process: [])
    assert owner.state() == "unknown"


def test_a_process_of_another_user_is_judged_by_its_start(monkeypatch):
    def forbidden(process, sign):
        raise PermissionError

    monkeypatch.setattr(os, "kill", forbidden)
    assert Owner.current().state() == "alive"


def test_a_killed_process_whose_parent_does_not_ask_for_its_end_is_dead():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = replace(Owner.current(), process=process.pid, start=ownership._start_time(process.pid))
    assert owner.state() == "alive"
    process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while not ownership._is_zombie(process.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert owner.state() == "dead"
    process.wait()


IN_ANOTHER_NAMESPACE = """
import sys
from pathlib import Path
from qerl_verl.ownership import state_of
print(state_of(Path(sys.argv[1])))
"""


def test_another_pid_namespace_cannot_judge(tmp_path):
    """In another namespace the same numbers mean other processes."""
    unshare = ["unshare", "--user", "--map-root-user", "--pid", "--mount-proc", "--fork"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system makes no PID namespaces for its users")
    Owner.current().write(tmp_path / "owner")
    command = [*unshare, sys.executable, "-c", IN_ANOTHER_NAMESPACE, str(tmp_path / "owner")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "unknown\n"


@pytest.mark.parametrize(
    "content",
    ["", "12345 678", "[]", "null", '{"host": "a"}', '{"host": 1, "boot": 1, "namespaces": 1, "process": 1, "start": 1}',
     '{"host": "a", "boot": "b", "namespaces": "c", "process": -1, "start": "d"}', b"\xff\xfe"],
)  # fmt: skip
def test_a_file_that_names_no_owner(tmp_path, content):
    file = tmp_path / "owner"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert Owner.read(file) is None and state_of(file) == "unknown"
    assert state_of(tmp_path / "absent") == "unknown"


def test_written_and_read_back(tmp_path):
    owner = Owner.current()
    owner.write(tmp_path / "owner")
    assert Owner.read(tmp_path / "owner") == owner and state_of(tmp_path / "owner") == "alive"
    assert str(owner) == f"process {os.getpid()} on {owner.host}"
