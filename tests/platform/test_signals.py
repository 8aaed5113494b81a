"""Tests the end of a process by a signal, with and without Ray: one line, exit handlers, exit
code 128 + number."""

import inspect
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest

from qerl_verl.platform import signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_what_is_under_way_cleans_up_and_a_second_signal_does_not_disturb_it(capfd, request, number, code):
    request.addfinalizer(partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    cleaned = []
    with pytest.raises(SystemExit) as ended, signals.ends_on_signals():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            cleaned.append(True)
    assert ended.value.code == code and cleaned == [True] and signal.getsignal(number) is signal.SIG_DFL
    assert capfd.readouterr().err.count(f"[qerl] {number.name} ends this process") == 1


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.ends_on_signals():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_nothing_changes():
    seen = []

    def work():
        with signals.ends_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


DRIVER = """
import atexit, time
import ray
from qerl_verl.platform.signals import end_driver_on_signals
assert end_driver_on_signals()
atexit.register(lambda: print("cleaned up", ray.is_initialized(), flush=True))

@ray.remote
def long():
    time.sleep(600)

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
task = long.remote()
print("in the middle of a step", flush=True)
ray.get(task)
"""


def test_a_driver_of_ray_ends_with_143_and_without_a_trace():
    """Ray by itself prints *** SIGTERM received at ..., and aborts."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert driver.stdout.readline() == "in the middle of a step\n", driver.stderr.read()
        driver.send_signal(signal.SIGTERM)
        out, err = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert (driver.returncode, out) == (143, "cleaned up True\n")
    assert err.count("[qerl] SIGTERM ends this process") == 1
    assert "SIGTERM received" not in err and "Traceback" not in err


def test_ray_calls_its_hooks_at_the_end_of_init():
    """Fails when Ray drops the hooks, or calls them before its core worker handles the signal."""
    from ray._private import worker

    assert isinstance(worker._post_init_hooks, list)
    init = inspect.getsource(worker.init)
    assert init.index("connect(") < init.index("for hook in _post_init_hooks")
