"""Signals that end a run (``scancel``, the end of a pod, a closed terminal): one line, a clean
end, exit code 128 + number."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from qerl_verl.ownership import host_name

ENDING = (signal.SIGTERM, signal.SIGHUP)

_received: int | None = None
"""The signal that is ending this process."""


def _end(number: int, frame: object) -> None:
    global _received
    _received = number
    for other in ENDING:  # one of them is enough, and what follows cleans up
        signal.signal(other, signal.SIG_IGN)
    line = f"[qerl] {signal.Signals(number).name} ends this process ({os.getpid()} on {host_name()}), exit code {128 + number}"
    os.write(2, f"\n{line}\n".encode())  # not print: the signal may have come in the middle of one
    raise SystemExit(128 + number)


def _install() -> None:
    """In the main thread alone, as Python has it. What is ignored (nohup) stays ignored."""
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end)


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """Within the block a signal of :data:`ENDING` raises SystemExit(128 + number), so that
    ``finally`` and exit handlers run."""
    before = {number: signal.getsignal(number) for number in ENDING}
    _install()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python


def end_driver_on_signals() -> bool:
    """Returns the same for the rest of a process that starts or joins Ray. Call it before anything
    that is to clean up at exit.

    Ray's core worker takes SIGTERM when it starts, writes a trace of addresses and aborts the
    process (exit code 134); and where a signal's exception comes in the middle of ``ray.get``, Ray
    turns it into exit code 1. So the handlers are installed again when Ray is up, and the last exit
    handler sets the code.

    Returns:
        False where this version of Ray does not call hooks after ``ray.init``
        (ray/_private/worker.py, ``_post_init_hooks``).
    """
    _install()
    atexit.register(_set_exit_code)
    from ray._private import worker

    hooks = getattr(worker, "_post_init_hooks", None)
    if not isinstance(hooks, list):
        return False
    hooks.append(_install)
    return True


def _set_exit_code() -> None:
    if _received is not None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + _received)
