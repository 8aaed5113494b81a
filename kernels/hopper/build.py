"""Compiles the Hopper kernels at first use, into a cache folder, and loads them through ctypes.

The library has a plain C interface over raw pointers and the caller's stream, so it depends on no
C++ ABI of PyTorch and compiles in seconds. ``QERL_KERNEL_CACHE`` names the cache folder (default
``~/.cache/qerl_verl/kernels``). Hosts of several kinds may share the folder, because the name of a
library identifies its sources, its host and its compilers (:func:`library_path`).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from qerl_verl.kernels.autotune import cache_folder

ARCH = "sm_90a"
MIN_NVCC = (12, 4)
"""Oldest CUDA compiler. The sources compile from CUDA 12.0 on, which introduced ``sm_90a``; ptxas
of 12.0 and of 12.3 serializes the wgmma instructions of some kernels, which that of 12.4 and later
does not. ``cudaGetDriverEntryPointByVersion`` is used where the toolkit has it (12.5)."""

SOURCES = ("nvfp4_gemm.cu", "nvfp4_block_values.cu", "lora_shrink.cu")
HEADERS = ("lora_flag.cuh", "nvfp4_format.cuh", "wgmma.cuh")
FLAGS = ("-O3", "-std=c++17", "--shared", "-Xcompiler", "-fPIC", "-gencode=arch=compute_90a,code=sm_90a")
_HERE = Path(__file__).parent


class BuildError(RuntimeError):
    """The library cannot be compiled or loaded on this host.

    Attributes:
        reason: one line, the compiler's last one where a compiler has failed.
    """

    def __init__(self, reason: str, log: str = ""):
        super().__init__(f"{reason}\n{log}".rstrip())
        self.reason = reason


def find_nvcc() -> str | None:
    """Returns ``nvcc`` of ``CUDA_HOME``, of ``PATH``, or of the default folder, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates: list[str | None] = [os.path.join(home, "bin", "nvcc") for home in homes if home]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and os.path.exists(c)), None)


@functools.cache
def nvcc_version(nvcc: str) -> str:
    """Returns the version that ``nvcc --version`` reports, for example ``13.0.88``.

    Raises:
        BuildError: nvcc does not run, or reports no version.
    """
    try:
        done = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise BuildError(f"{nvcc} cannot be run: {error.strerror}") from error
    match = re.search(r"\bV(\d+\.\d+(?:\.\d+)?)", done.stdout)
    if done.returncode or match is None:
        raise BuildError(f"{nvcc} --version failed: {last_line(done.stdout)}", done.stdout)
    return match[1]


@functools.cache
def host_compiler() -> str:
    """Returns the name and version of the C++ compiler to which nvcc passes the host's code
    (``NVCC_CCBIN``, or g++); empty without one.
    """
    compiler = shutil.which(os.environ.get("NVCC_CCBIN") or "g++")
    if compiler is None:
        return ""
    done = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout.partition("\n")[0]


def last_line(log: str) -> str:
    """Returns the last line of a compiler's output that reports an error, or else the last one that
    is not empty."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(?:error|fatal)\b.*:", line)]
    return (errors or lines or ["it printed nothing"])[-1]


def _file_name(toolchain: str) -> str:
    sources = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        sources.update(name.encode() + (_HERE / name).read_bytes())
    sources.update(" ".join((*FLAGS, ARCH)).encode())
    libc = "".join(platform.libc_ver())
    return f"hopper-{sources.hexdigest()[:16]}-{platform.machine()}-{libc}-{toolchain}.so"


def library_path() -> Path:
    """Returns the path of the compiled library.

    The name is made of the sources and flags, the machine's architecture and C library, and the
    versions of nvcc (which is CUDA's) and of the host's compiler. On a host without nvcc the
    compiler is not compared: the newest library that otherwise fits is used.

    Raises:
        BuildError: nvcc does not run.
    """
    root, nvcc = cache_folder(), find_nvcc()
    if nvcc is not None:
        host = hashlib.sha256(host_compiler().encode()).hexdigest()[:8]
        return root / _file_name(f"cuda{nvcc_version(nvcc)}-{host}")
    found = [path for path in root.glob(_file_name("*")) if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=root / _file_name("none"))


def compile_library(path: Path) -> None:
    """Compiles to ``path``. Processes that do so at the same time each write their own file and
    rename it. Warns where ptxas reports that it serialized wgmma instructions.

    Raises:
        BuildError: no nvcc, one older than :data:`MIN_NVCC`, or one that fails, with its last line
            and all of its output.
        OSError: the folder cannot be written to.
    """
    nvcc, oldest = find_nvcc(), ".".join(map(str, MIN_NVCC))
    if nvcc is None:
        raise BuildError(
            f"they are not compiled yet and there is no nvcc (CUDA {oldest} or newer): set CUDA_HOME or put nvcc on PATH"
        )
    version = nvcc_version(nvcc)
    if tuple(map(int, version.split(".")[:2])) < MIN_NVCC:
        raise BuildError(f"{nvcc} is CUDA {version}, and they need {oldest} or newer: set CUDA_HOME to a newer toolkit")
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
                raise BuildError(f"nvcc failed to compile them: {last_line(log)}", log)
        slower = [line for log in logs for line in log.splitlines() if "wgmma" in line and "serialized" in line]
        if slower:
            warnings.warn(
                f"nvcc {version} serializes the wgmma instructions of {len(slower)} Hopper "
                "kernels, which costs speed; set CUDA_HOME to another toolkit. "
                f"{slower[0].strip()}",
                stacklevel=2,
            )
        output = Path(folder) / path.name
        link = [nvcc, "--shared", "-gencode=arch=compute_90a,code=sm_90a", *map(str, objects), "-o", str(output)]
        done = subprocess.run(link, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise BuildError(f"nvcc failed to link them: {last_line(done.stdout)}", done.stdout)
        os.replace(output, path)


@functools.cache
def problem() -> str | None:
    """Compiles the library if the cache does not have it, and loads it. Returns why this failed, in
    one line, or None.

    A process tries once, although every layer asks.
    """
    try:
        load_library()
    except BuildError as error:
        return error.reason
    except OSError as error:  # a full disk, a folder without permission, a library of another system
        return f"{type(error).__name__}: {last_line(str(error))}"
    return None


@functools.cache
def load_library() -> ctypes.CDLL:
    """Returns the loaded library with typed functions; compiles it if the cache does not have it.

    Raises:
        BuildError: see :func:`compile_library`.
        OSError: it cannot be written or loaded.
    """
    path = library_path()
    if not path.exists():
        compile_library(path)
    library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    library.qerl_nvfp4_gemm.argtypes = [
        pointer, pointer, pointer, ctypes.c_float, pointer, pointer,  # x, packed, scale, inverse_scale, bias, y
        pointer, pointer, *[integer] * 4, pointer,  # u, lora_b, rank, shards, shard_end0, shard_end1, flag
        *[integer] * 6, pointer, integer, integer,  # m, n, k, config, blocks, cluster, workspace, slot, pdl
        pointer,
    ]  # fmt: skip
    library.qerl_lora_shrink.argtypes = [
        pointer, pointer, pointer, ctypes.c_float, *[integer] * 5,  # x, a, u, factor, m, k, rows, shape, cluster
        pointer, integer, pointer,  # flag, pdl
    ]  # fmt: skip
    library.qerl_nvfp4_block_values.argtypes = [pointer, pointer, pointer, integer, integer, pointer]
    library.qerl_nvfp4_flag.argtypes = [integer, integer]
    library.qerl_nvfp4_flag.restype = pointer
    library.qerl_nvfp4_config.argtypes = [integer, ctypes.POINTER(integer)]
    library.qerl_nvfp4_config.restype = None
    library.qerl_cuda_error.restype = ctypes.c_char_p
    return library
