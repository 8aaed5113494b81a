"""Tells whether this machine can compile what torch.compile writes. The module can be imported
without torch, verl or vLLM."""

from __future__ import annotations

import os
import shutil


def missing_compiler(device_type: str) -> str | None:
    """Returns which compiler torch.compile lacks on a machine that computes on ``device_type``,
    with the fix; None if it lacks none.

    On a GPU, Triton compiles its launchers with a C compiler (triton/runtime/build.py). On a CPU,
    TorchInductor compiles its kernels with a C++ compiler (torch/_inductor/config.py, ``cpp.cxx``).
    """
    variable, names, language = ("CC", ("gcc", "clang"), "C") if device_type == "cuda" else ("CXX", ("g++",), "C++")
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return None
    return f"no {language} compiler: install {names[0]} or set {variable}"
