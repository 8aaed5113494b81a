"""The Triton kernels, in processes of their own (``triton_cases.py``).

Triton decides when it is imported whether it interprets kernels or compiles them, for the whole
process, and other tests must not inherit that."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.backends import Choice, KernelCount, get_backend
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.triton import tuning

CASES = Path(__file__).with_name("triton_cases.py")
GROUPS = ("BlockValues", "Gemm", "Experts", "Ops")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed (requirements/test.txt, `make test`)"
)


def run_cases(selected, marks, tmp_path, **environment):
    """Runs the tests of ``triton_cases.py`` that pytest's ``-k selected -m marks`` selects."""
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
    """From Ampere to Blackwell, without a GPU: shared memory, IEEE division, no flushing of
    subnormal numbers. The quick tier compiles for Ampere."""
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
from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.backends import Choice, KernelCount, get_backend
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.triton import tuning
assert ("triton" in sys.modules) == ({without!r} == "triton")
reason = triton_kernels.unsupported_device()
assert ("Triton cannot be imported" if {without!r} == "triton" else "no CUDA device") in reason, reason
packed, scale = torch.zeros(64, 32, dtype=torch.uint8), torch.zeros(64, 4, dtype=torch.uint8)
for call in (
    lambda: triton_kernels.gemm(torch.zeros(1, 64).bfloat16(), PackedWeight(packed, scale, 1.0)),
    lambda: triton_kernels.block_values(packed, scale),
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


def test_unsupported_weight():
    assert (
        triton_kernels.unsupported_weight(33, 64) is None
        and triton_kernels.unsupported_weight(1, 64, torch.float16) is None
    )
    assert "multiple of 64" in triton_kernels.unsupported_weight(64, 96)
    assert "bfloat16 or float16" in triton_kernels.unsupported_weight(64, 64, torch.float32)


@pytest.mark.parametrize("m", [1, 8, 16, 17, 64, 65, 128, 512])
@pytest.mark.parametrize("n, k", [(7, 64), (896, 4864), (4608, 3584), (3584, 18944), (151936, 896)])
def test_choose(m, n, k):
    plan = triton_kernels.choose(m, n, k)
    steps = k // plan.block_k
    part = -(-steps // plan.split_k)
    assert plan.path == "fused" and k % plan.block_k == 0
    assert 1 <= plan.split_k <= 16 and (plan.split_k - 1) * part < steps  # no part is empty
    assert "fused" in str(plan)
    assert triton_kernels.choose(m, n, k, 16).split_k <= plan.split_k  # a smaller GPU splits less


def test_choose_decodes_first_for_many_tokens():
    assert triton_kernels.choose(513, 4608, 3584).path == "decode first"
    assert "decode, then" in str(triton_kernels.choose(8192, 64, 64))
    assert triton_kernels.choose(1, 64, 8192).split_k > 1 and triton_kernels.choose(1, 151936, 896).split_k == 1


# ------------------------------------------------------------------------------------------- tuning
@pytest.fixture
def no_choices(monkeypatch):
    monkeypatch.setattr(tuning, "_tuned", {})
    tuning.choose.cache_clear()
    yield
    tuning.choose.cache_clear()


SHAPES = [(7, 64), (4608, 3584), (3584, 18944), (28672, 4096)]


@pytest.mark.parametrize("n, k", SHAPES)
@pytest.mark.parametrize("m", tuning.LIMITS)
def test_candidates_begin_with_the_table_and_leave_no_part_empty(no_choices, m, n, k):
    plans = list(tuning.candidates(m, n, k, 132))
    assert plans[0] == triton_kernels.choose(m, n, k, 132) and len(set(plans)) == len(plans)
    assert (tuning.DECODE_FIRST in plans) is (m >= tuning.DECODE_FIRST_CANDIDATE_FROM)
    for plan in plans:
        if plan != tuning.DECODE_FIRST:
            steps = k // plan.block_k
            assert k % plan.block_k == 0 and 1 <= plan.split_k <= tuning.MAX_SPLIT
            assert (plan.split_k - 1) * -(-steps // plan.split_k) < steps


def test_installed_choices_serve_every_number_of_tokens(no_choices):
    n, k = 3584, 512
    tiles = {limit: list(tuning.candidates(limit, n, k, 132))[1] for limit in tuning.LIMITS}
    plans = [tuning.DECODE_FIRST if limit > 256 else tile for limit, tile in tiles.items()]
    before = triton_kernels.choose(64, n, k + 64)
    tuning.install(n, k, [tuning.Tuned(*pair) for pair in zip(tuning.LIMITS, plans)])
    assert tuning.installed(n, k) and not tuning.installed(k, n)
    for m, limit in ((1, 16), (16, 16), (17, 32), (200, 256), (256, 256), (257, 512)):
        assert triton_kernels.choose(m, n, k) == plans[tuning.LIMITS.index(limit)]
    assert triton_kernels.choose(257, n, k) == triton_kernels.choose(5000, n, k) == tuning.DECODE_FIRST
    assert triton_kernels.choose(64, n, k + 64) == before
    backend = get_backend("triton")
    assert [backend.decodes_first(m, n, k) for m in (256, 257)] == [False, True]
    count = KernelCount()
    count.add("down_proj", Choice(backend, shape=(n, k)), torch.device("cpu"))
    assert str(count) == (
        "Triton W4A16 on cpu: 1 layer (down_proj 1), 3584 x 512 decoded before the GEMM for more than 256 tokens"
    )


@needs_triton
def test_the_fastest_plan_is_chosen_and_one_that_does_not_fit_is_none(no_choices):
    from triton.runtime.errors import OutOfResources

    from qerl_verl.kernels.triton import measure

    plans = list(tuning.candidates(256, 3584, 512, 132))
    times = {plan: 50.0 + i for i, plan in enumerate(plans)}
    times[tuning.DECODE_FIRST], times[plans[2]] = 40.0, 10.0

    def call_of(plan):
        def call(copy):
            if plan == plans[2]:
                raise OutOfResources(200_000, 101_376, "shared memory")
            timed.append(plan)

        return call

    def time_call(call, copies, replays):
        call(0)
        return times[timed[-1]]

    timed = []
    assert measure.best(plans, call_of, 2, time_call) == tuning.DECODE_FIRST
    with pytest.raises(RuntimeError, match="no launch configuration"):
        measure.best([plans[2]], call_of, 2, time_call)


@pytest.mark.gpu
@needs_triton
def test_measured_launches_compute_the_same(no_choices, tmp_path, monkeypatch):
    if reason := triton_kernels.unsupported_device():
        pytest.skip(reason)
    monkeypatch.setenv("QERL_KERNEL_CACHE", str(tmp_path))
    n, k, device = 640, 512, torch.device("cuda", torch.cuda.current_device())
    assert "launches of 640x512 measured in" in triton_kernels.tune(device, n, k)
    assert triton_kernels.tune(device, n, k) is None
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scale = torch.randint(0x28, 0x40, (n, k // 16), dtype=torch.uint8, device=device)
    weight = block_values_nvfp4(packed, scale, torch.float64)
    for m in (1, 8, 33, 64, 100, 200, 256, 700, 1000, 4000):
        x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        expected = x.double() @ weight.t()
        error = (triton_kernels.gemm(x, PackedWeight(packed, scale, 1.0)).double() - expected).norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps * expected.norm()
    chosen = [triton_kernels.choose(m, n, k) for m in (1, 100, 1000)]
    tuning._tuned.clear()
    tuning.choose.cache_clear()
    assert triton_kernels.tune(device, n, k) is None, "the cache has the choice"
    assert [triton_kernels.choose(m, n, k) for m in (1, 100, 1000)] == chosen
