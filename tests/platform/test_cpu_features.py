"""Tests which CPUs count as having bfloat16 arithmetic, and that PyTorch agrees about this one."""

import subprocess
import sys

import pytest
import torch

from qerl_verl.platform.cpu_features import ISAS_WITHOUT_BFLOAT16, missing_bfloat16

NONE = "this CPU has no bfloat16 instructions"
CASES = {
    "laptop": ("flags\t\t: fpu sse4_2 avx avx2 fma f16c\n", {}, NONE),
    "avx512 without bfloat16": ("flags : avx2 avx512f avx512_vnni\n", {}, NONE),
    "avx512 with bfloat16": ("flags : avx2 avx512f avx512_bf16\n", {}, None),
    "amx": ("flags : avx2 avx512f amx_bf16 amx_tile\n", {}, None),
    "arm with bfloat16": ("processor : 0\nFeatures : fp asimd bf16 i8mm\n", {}, None),
    "arm without": ("processor : 0\nFeatures : fp asimd\n", {}, NONE),
    "no flags": ("processor : 0\n", {}, None),
    "no such file": (None, {}, None),
    "limited": ("flags : avx512_bf16\n", {"ONEDNN_MAX_CPU_ISA": "avx2"}, "ONEDNN_MAX_CPU_ISA=AVX2 keeps"),
    "limited by the older name": ("flags : avx512_bf16\n", {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, "=AVX512_CORE keeps"),
    "limited above it": ("flags : avx512_bf16\n", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, None),
    "not limited": ("flags : avx512_bf16\n", {"ONEDNN_MAX_CPU_ISA": "DEFAULT"}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cpu_and_the_environment_decide(case, tmp_path):
    text, environment, expected = CASES[case]
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    reason = missing_bfloat16(environment, tmp_path / "cpuinfo")
    assert (reason is None) if expected is None else (expected in reason)


def test_where_bfloat16_counts_as_fast_pytorch_has_kernels_for_it():
    if missing_bfloat16() is None:
        assert torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(missing_bfloat16({}) is not None, reason="needs a CPU with bfloat16 arithmetic")
def test_pytorch_heeds_the_variable_that_stands_for_another_cpu():
    """``ONEDNN_MAX_CPU_ISA=AVX2`` therefore shows what such a CPU computes."""
    assert "AVX2" in ISAS_WITHOUT_BFLOAT16
    code = "import torch; print(torch.ops.mkldnn._is_mkldnn_bf16_supported())"
    environment = {"ONEDNN_MAX_CPU_ISA": "AVX2", "PATH": "", "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
