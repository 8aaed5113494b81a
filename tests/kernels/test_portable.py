"""The portable Triton kernels, in processes of their own (``portable_cases.py``).

Triton decides when it is imported whether it interprets kernels or compiles them, for the whole process, and other
tests must not inherit that.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qerl_verl.kernels import portable

CASES = Path(__file__).with_name("portable_cases.py")
GROUPS = ("Dequantize", "Quantize", "Gemm", "Ops")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (requirements/test.txt, `make test`)"
)


def run_cases(selected, marks, tmp_path, **environment):
    """The tests of ``portable_cases.py`` that pytest's ``-k selected -m marks`` selects."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), **environment}
    command = [sys.executable, "-m", "pytest", str(CASES), "-q", "-x", "--noconftest", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, "-k", selected, "-m", marks], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


QUICK_AND_SLOW = ["not slow", pytest.param("slow", marks=pytest.mark.slow)]


@needs_triton
@pytest.mark.parametrize("marks", QUICK_AND_SLOW)
def test_in_the_interpreter(marks, tmp_path):
    run_cases("not TestCompile", marks, tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@needs_triton
@pytest.mark.parametrize("marks", QUICK_AND_SLOW)
def test_compiles_for_every_architecture(marks, tmp_path):
    """From Ampere to Blackwell, without a GPU: shared memory, IEEE division, no flushing of subnormal numbers. The quick tier
    compiles for Ampere."""
    run_cases("TestCompile", marks, tmp_path)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("group", GROUPS)
def test_on_the_gpu(group, tmp_path):
    run_cases(f"Test{group}", "", tmp_path)


@pytest.mark.parametrize("without", ["triton", "gpu"])
def test_says_what_is_missing(without):
    """Importing works without Triton and without a GPU; a call says what is missing."""
    if without == "gpu" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    program = f"""
import sys
if {without!r} == "triton":
    sys.modules["triton"] = None
import torch
from qerl_verl.kernels import portable
assert ("triton" in sys.modules) == ({without!r} == "triton")
reason = portable.availability()
assert not portable.is_available()
assert ("Triton cannot be imported" if {without!r} == "triton" else "no CUDA device") in reason, reason
packed, scale = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)
for call in (
    lambda: portable.gemm(torch.zeros(1, 64).bfloat16(), packed, scale, 1.0),
    lambda: portable.dequantize(packed, scale),
    lambda: portable.quantize(torch.zeros(1, 64), torch.ones(1)),
):
    try:
        call()
    except RuntimeError as error:
        assert reason in str(error), error
    else:
        raise AssertionError("no error")
print("as expected")
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "CUDA_VISIBLE_DEVICES": ""
    }
    result = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "as expected", result.stdout + result.stderr


def test_check():
    assert portable.check(33, 64) is None and portable.check(1, 64, torch.float16) is None
    assert "multiple of 64" in portable.check(64, 96)
    assert "bfloat16 or float16" in portable.check(64, 64, torch.float32)


@pytest.mark.parametrize("m", [1, 8, 16, 17, 64, 65, 128, 512])
@pytest.mark.parametrize("n, k", [(7, 64), (896, 4864), (4608, 3584), (3584, 18944), (151936, 896)])
def test_choose(m, n, k):
    plan = portable.choose(m, n, k)
    steps = k // plan.block_k
    part = -(-steps // plan.split_k)
    assert plan.path == "fused" and k % plan.block_k == 0
    assert 1 <= plan.split_k <= 16 and (plan.split_k - 1) * part < steps  # no part is empty
    assert "fused" in str(plan)
    assert portable.choose(m, n, k, 16).split_k <= plan.split_k  # a smaller GPU splits less


def test_choose_dequantizes_for_many_tokens():
    assert portable.choose(513, 4608, 3584).path == "dequantize"
    assert "dequantize" in str(portable.choose(8192, 64, 64))
    assert portable.choose(1, 64, 8192).split_k > 1 and portable.choose(1, 151936, 896).split_k == 1
