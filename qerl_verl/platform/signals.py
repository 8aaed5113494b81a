"""Signals that end a run (``scancel``, the end of a pod, a closed terminal): the process prints one
line, cleans up, and exits with 128 + number.
"""

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
    """Installs the handlers, in the main thread alone, as Python requires. Signals that are ignored
    (nohup) stay ignored.
    """
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end)


@contextmanager
def ends_on_signals() -> Iterator[None]:
    """Makes a signal of :data:`ENDING` raise SystemExit(128 + number) within the block, so that
    ``finally`` and exit handlers run.
    """
    before = {number: signal.getsignal(number) for number in ENDING}
    _install()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                # None: not installed from Python
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def end_driver_on_signals() -> bool:
    """Installs the handlers of :func:`ends_on_signals` for the rest of a process that starts or
    joins Ray. Call it before any code that cleans up at exit.

    When Ray's core worker starts, it installs a handler of SIGTERM that writes a trace of addresses
    and aborts the process (exit code 134). If a signal's exception arrives in the middle of
    ``ray.get``, Ray turns it into exit code 1. So the handlers are installed again when Ray has
    started, and the last exit handler sets the code.

    Returns:
        False if this version of Ray does not call hooks after ``ray.init``
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
