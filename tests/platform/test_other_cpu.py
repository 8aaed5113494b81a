"""Runs tests of arithmetic again in a process that computes as a CPU without AVX-512.

Two variables stand for such a CPU: ``ONEDNN_MAX_CPU_ISA`` for oneDNN's GEMMs, and
``ATEN_CPU_CAPABILITY`` for PyTorch's own kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
OTHER_CPU = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
QUICK = [
    "platform/test_other_cpu.py::test_this_process_computes_as_it_was_asked_to",
    *("kernels/test_nvfp4_linear.py", "kernels/test_nvfp4_lora_linear.py", "kernels/test_backends.py", "aqn"),
    *("lora/test_peft.py", "lora/test_experts.py"),
    "nvfp4/test_quantize.py::test_model_loaded_by_transformers",
    *("engine/test_batches.py", "rollout/test_scheme.py", "rollout/test_lora.py"),
]
ONE_MODEL = ("-k", "not value_model")
LONG = ("-m", "slow")  # the last -m counts
SLOW = [
    *("kernels", "engine/test_fsdp.py", "engine/test_critic.py", "engine/test_many_ranks.py", "engine/test_compile.py"),
    *("engine/test_batches.py", "lora", "rollout/test_live_engine.py"),
]


def test_this_process_computes_as_it_was_asked_to():
    """This process computes as the environment says, if it says anything."""
    wanted = os.environ.get("ATEN_CPU_CAPABILITY")
    assert wanted is None or torch.backends.cpu.get_cpu_capability().lower() == wanted
    if os.environ.get("ONEDNN_MAX_CPU_ISA") == "AVX2":
        assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == OTHER_CPU["ATEN_CPU_CAPABILITY"].upper(), reason="this is such a CPU"
)
@pytest.mark.parametrize(
    ("tests", "options"),
    [
        (QUICK, ONE_MODEL),
        pytest.param(SLOW, (), marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param(["quickstart/test_tiny_model.py"], LONG, marks=pytest.mark.slow),
    ],
)
def test_the_numbers_hold_without_avx512(tests, options, tmp_path):
    selected = "not slow and not gpu and not integration"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selected]
    command += [f"--basetemp={tmp_path / 'other'}", *(str(TESTS / t) for t in tests), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    # compiled code of the two must not be mixed
    environment |= OTHER_CPU | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "QERL_TEST_ONE_THREAD": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
