"""Tests that an engine's processes end with the evaluation, and that the terminal's signals do
not reach them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from qerl_verl.switch import EVALUATION_ENV

CHILD = """
import os, time
from qerl_verl.evaluation.processes import stay_with_evaluation
stay_with_evaluation()
print(os.getpid(), os.getpgid(0), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
if sys.argv[2] == "evaluation":
    os.environ[sys.argv[3]] = str(os.getpid())
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(60)
"""


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.parametrize("belongs", [True, False])
def test_a_process_of_the_engine_ends_with_the_evaluation(belongs):
    command = [sys.executable, "-c", PARENT, CHILD, "evaluation" if belongs else "other", EVALUATION_ENV]
    environment = {name: value for name, value in os.environ.items() if name != EVALUATION_ENV}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    child, group = map(int, parent.stdout.readline().split())
    try:
        assert group == (child if belongs else parent.pid)
        parent.kill()
        parent.wait()
        until = time.monotonic() + (10 if belongs else 0.5)
        while alive(child) and time.monotonic() < until:
            time.sleep(0.02)
        assert alive(child) != belongs
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)


def test_the_evaluation_itself_stays_where_it_is(monkeypatch):
    from qerl_verl.evaluation.processes import stay_with_evaluation

    group = os.getpgid(0)
    for value in (None, str(os.getpid())):
        monkeypatch.delenv(EVALUATION_ENV, raising=False) if value is None else monkeypatch.setenv(
            EVALUATION_ENV, value
        )
        stay_with_evaluation()
    assert os.getpgid(0) == group
