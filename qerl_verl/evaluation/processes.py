"""Ends vLLM's processes together with the evaluation that started them, and not before.

vLLM leaves its engine running, with its GPU memory, when the process that started it is killed.
Ctrl-C in a terminal reaches all processes of a group, so the engine would end before the evaluation
has stored the last responses.
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
    """Leaves the terminal's process group and ties the process to its parent.

    vLLM calls this function at the start of each of its processes, through the plugin of the group
    ``vllm.general_plugins``. It acts only in a process of an evaluation's engine.
    """
    if os.environ.get(EVALUATION_ENV) in (None, str(os.getpid())):
        return
    with contextlib.suppress(PermissionError):  # the process already leads a session
        os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
