"""Compiling the Hopper kernels: with compilers that fail, in processes that share a cache, on a
host like no other."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qerl_verl.kernels import hopper
from qerl_verl.kernels.backends import choose_backend
from qerl_verl.kernels.hopper import build


@pytest.fixture(autouse=True)
def nothing_is_remembered(monkeypatch, tmp_path):
    """Clears what this process remembers, before and after, and keeps the user's cache out."""
    cached = (
        build.nvcc_version,
        build.host_compiler,
        build.problem,
        build.load_library,
        hopper.support._unsupported_device,
    )
    for function in cached:
        function.cache_clear()
    monkeypatch.setenv("QERL_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Puts an ``nvcc`` of a version in place that does what a line of shell says."""

    def install(version="13.0.88", does="exit 0"):
        home = tmp_path / f"cuda-{version}"
        (home / "bin").mkdir(parents=True)
        nvcc = home / "bin" / "nvcc"
        nvcc.write_text(
            "#!/bin/sh\n"
            f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version[:4]}, V{version}"; exit; fi\n'
            f"{does}\n"
        )
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))
        build.nvcc_version.cache_clear()
        build.host_compiler.cache_clear()
        return nvcc

    return install


FAILURES = [
    # version, what it does, the reason
    (
        "12.4.131",
        "echo 'nvfp4_gemm.cu(694): error: identifier \"f\" is undefined'; echo; echo '1 error detected in the compilation.'; exit 2",
        'nvcc failed to compile them: nvfp4_gemm.cu(694): error: identifier "f" is undefined',
    ),
    (
        "13.0.88",
        "echo gcc: not found; echo 'nvcc fatal   : Failed to preprocess host compiler properties.'; exit 1",
        "nvcc failed to compile them: nvcc fatal   : Failed to preprocess host compiler properties.",
    ),
    ("13.0.88", "echo killed; exit 137", "nvcc failed to compile them: killed"),
    ("13.0.88", "exit 1", "nvcc failed to compile them: it printed nothing"),
    ("13.0.88", 'case "$1" in --shared) echo ld: no space; exit 1;; esac', "nvcc failed to link them: ld: no space"),
    ("12.3.107", "exit 0", "nvcc is CUDA 12.3.107, and they need 12.4 or newer: set CUDA_HOME to a newer toolkit"),
]


@pytest.mark.parametrize(("version", "does", "reason"), FAILURES)
def test_a_compiler_that_fails_is_the_reason_and_the_next_backend_takes_the_layer(
    monkeypatch, compiler, version, does, reason
):
    """Decided before anything is computed; nothing is left in the cache, and the compiler is not
    asked again."""
    nvcc = compiler(version, f"echo x >> {'{0}.calls'}; {does}".replace("{0}", "$0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    monkeypatch.setattr("qerl_verl.kernels.triton.unsupported_device", lambda device: None)
    device = torch.device("cuda", 0)
    choice = choose_backend(device, (128, 128))
    assert choice.backend.name == "triton"
    assert choice.passed_over[0].endswith(reason) and choice.passed_over[0].startswith("not hopper: ")
    calls = Path(f"{nvcc}.calls")
    before = calls.exists() and calls.read_text()
    with pytest.raises(ValueError, match="qerl.kernel=hopper cannot run on NVIDIA H100: ") as refusal:
        choose_backend(device, (128, 128), wanted="hopper")
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)
    assert (calls.exists() and calls.read_text()) == before
    assert not [path for path in build.library_path().parent.glob("*") if path.name != "nvcc"]


SERIALIZED = (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "non wgmma instructions defining accumulator registers in the function 'gemm_kernel'"
)
NOTES = [
    # what ptxas says of a kernel that it compiles, the warning
    (SERIALIZED, r"nvcc 12\.9\.86 serializes the wgmma instructions of 3 Hopper kernels, .* \(C7515\) "),
    ("ptxas info    : Used 168 registers, used 3 barriers", None),
]


@pytest.mark.parametrize(("note", "warning"), NOTES)
def test_kernels_that_ptxas_made_slower_are_reported(compiler, recwarn, note, warning):
    compiler("12.9.86", f'case $1 in --shared) ;; *) echo "{note}" ;; esac; for o; do :; done; : > "$o"')
    build.compile_library(build.library_path())
    messages = [str(caught.message) for caught in recwarn]
    assert build.library_path().exists()
    assert len(messages) == (warning is not None)
    assert warning is None or re.search(warning, messages[0])


def test_the_compilers_whole_output_is_in_the_error(compiler):
    compiler(does="echo first; echo second; exit 1")
    with pytest.raises(build.BuildError, match="compile them: second\nfirst\nsecond"):
        build.load_library()


@pytest.mark.parametrize("missing", ["nvcc", "cache"])
def test_without_a_compiler_or_a_cache_the_reason_names_what_to_do(monkeypatch, compiler, tmp_path, missing):
    if missing == "nvcc":
        monkeypatch.setattr(build, "find_nvcc", lambda: None)
        assert "there is no nvcc (CUDA 12.4 or newer): set CUDA_HOME" in build.problem()
    else:
        compiler()
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("QERL_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
        assert build.problem().startswith("NotADirectoryError: ")


def test_a_library_that_cannot_be_loaded_is_a_reason(compiler):
    compiler()
    path = build.library_path()
    path.parent.mkdir()
    path.write_text("of another system")
    assert build.problem().startswith("OSError: ") and path.name in build.problem()


KEYS = [
    # what differs between two hosts that share a cache
    ("architecture", lambda patch, compiler: patch(platform, "machine", lambda: "aarch64")),
    ("C library", lambda patch, compiler: patch(platform, "libc_ver", lambda: ("glibc", "2.17"))),
    ("CUDA version", lambda patch, compiler: compiler("12.8.93")),
    ("host compiler", lambda patch, compiler: patch(build, "host_compiler", lambda: "g++ (Debian) 14.2.0")),
    ("flags", lambda patch, compiler: patch(build, "FLAGS", ("-O0",))),
]


@pytest.mark.parametrize(("what", "change"), KEYS, ids=[what for what, _ in KEYS])
def test_hosts_that_differ_share_no_library(monkeypatch, compiler, what, change):
    compiler()
    before = build.library_path()
    change(monkeypatch.setattr, compiler)
    assert build.library_path() != before and build.library_path().parent == before.parent


def test_a_host_without_nvcc_takes_the_library_of_one_like_it(monkeypatch, compiler):
    compiler()
    path = build.library_path()
    path.parent.mkdir()
    path.write_text("")
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.library_path() == path
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert build.library_path() != path


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(build.find_nvcc() is None or not shutil.which("g++"), reason="no nvcc, or no host compiler")
@pytest.mark.parametrize("entry_point", ["of the toolkit", "before 12.5"])
def test_the_sources_compile(tmp_path, entry_point):
    """Without a GPU: both ways to find the driver's function, of which a toolkit takes one."""
    for name in (*build.SOURCES, *build.HEADERS):
        text = (Path(build.__file__).parent / name).read_text()
        if entry_point == "before 12.5" and name == "nvfp4_gemm.cu":
            assert "#if CUDART_VERSION >= 12050" in text
            text = text.replace("#if CUDART_VERSION >= 12050", "#if 0")
        (tmp_path / name).write_text(text)
    flags = [f for f in build.FLAGS if f != "--shared"]
    command = [build.find_nvcc(), *flags, "-c", "nvfp4_gemm.cu", "-o", "gemm.o"]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    assert "serialized" not in done.stdout  # wgmma instructions one after the other
