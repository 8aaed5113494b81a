"""Compile the Hopper kernels at first use, into a cache folder, and load them through ctypes.

The library has a plain C interface over raw pointers and the caller's stream, so it depends on no C++ ABI of PyTorch and
compiles in seconds. ``QERL_KERNEL_CACHE`` names the cache folder (default ``~/.cache/qerl_verl/kernels``).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ARCH = "sm_90a"
SOURCES = ("nvfp4_gemm.cu", "nvfp4_dequantize.cu", "lora_shrink.cu")
HEADERS = ("lora_flag.cuh", "nvfp4_format.cuh", "wgmma.cuh")
FLAGS = ("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-gencode=arch=compute_90a,code=sm_90a")
_HERE = Path(__file__).parent


def find_nvcc() -> str | None:
    """``nvcc`` of ``CUDA_HOME``, of ``PATH``, or of the usual place, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.path.exists(c)), None)


def library_path() -> Path:
    """Where the compiled library belongs: a name made of the sources, the compiler's flags, and the versions at hand."""
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update(name.encode() + (_HERE / name).read_bytes())
    digest.update(" ".join((*FLAGS, ARCH, torch.__version__, str(torch.version.cuda))).encode())
    root = Path(os.environ.get("QERL_KERNEL_CACHE") or Path.home() / ".cache" / "qerl_verl" / "kernels")
    return root / f"hopper-{digest.hexdigest()[:16]}.so"


def compile_library(path: Path) -> None:
    """Compile to ``path``. Processes that do so at the same time each write their own file and rename it."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("the Hopper kernels need nvcc (CUDA 12.4 or newer): set CUDA_HOME or put nvcc on PATH")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = [Path(folder) / (name + ".o") for name in SOURCES]
        compile_flags = [f for f in FLAGS if f != "--shared"]
        jobs = [
            subprocess.Popen(
                [nvcc, *compile_flags, "-c", str(_HERE / name), "-o", str(obj)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for name, obj in zip(SOURCES, objects)
        ]  # fmt: skip
        logs = [job.communicate()[0] for job in jobs]
        for job, log in zip(jobs, logs):
            if job.returncode:
                raise RuntimeError(f"nvcc failed on the Hopper kernels:\n{log}")
        output = Path(folder) / path.name
        link = [nvcc, "--shared", "-gencode=arch=compute_90a,code=sm_90a", *map(str, objects), "-o", str(output)]
        done = subprocess.run(link, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed to link the Hopper kernels:\n{done.stdout}")
        os.replace(output, path)


@functools.cache
def load_library() -> ctypes.CDLL:
    """The loaded library with typed functions; compiles it if the cache does not have it."""
    path = library_path()
    if not path.exists():
        compile_library(path)
    library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.qerl_nvfp4_gemm.argtypes = [
        pointer, pointer, pointer, ctypes.c_float, pointer, pointer,  # x, packed, scale, alpha, bias, y
        pointer, pointer, *[integer] * 4, pointer,  # u, lora_b, rank, shards, shard_end0, shard_end1, flag
        *[integer] * 6, pointer, integer, integer,  # m, n, k, config, blocks, cluster, workspace, slot, pdl
        pointer,
    ]  # fmt: skip
    library.qerl_lora_shrink.argtypes = [
        pointer, pointer, pointer, ctypes.c_float, *[integer] * 5, pointer, integer, pointer,  # x, a, u, factor, m, k, rows, shape, cluster, flag, pdl
    ]  # fmt: skip
    library.qerl_nvfp4_dequantize.argtypes = [pointer, pointer, pointer, integer, integer, pointer]
    library.qerl_nvfp4_flag.argtypes = [integer, integer]
    library.qerl_nvfp4_flag.restype = pointer
    library.qerl_nvfp4_config.argtypes = [integer, ctypes.POINTER(integer)]
    library.qerl_nvfp4_config.restype = None
    return library
