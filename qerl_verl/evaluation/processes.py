"""vLLM's processes end with the evaluation that started them, and not before.

vLLM leaves its engine running, with its GPU memory, when the process that started it is killed. And
Ctrl-C in a terminal reaches all processes of a group, so the engine would end before the evaluation
has put the last responses away.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

from qerl_verl.switch import EVALUATION_ENV

_PR_SET_PDEATHSIG = 1  # prctl(2)


def stay_with_evaluation() -> None:
    """In a process of an evaluation's engine: leave the terminal's process group, and end with the parent.

    vLLM calls it at the start of each of its processes, through the plugin of the group ``vllm.general_plugins``. In
    other processes nothing happens.
    """
    if os.environ.get(EVALUATION_ENV) in (None, str(os.getpid())):
        return
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
