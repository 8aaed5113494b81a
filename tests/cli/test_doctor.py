"""Tests `qerl doctor` on this working installation, and on broken ones."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from qerl_verl.cli import doctor


def test_this_installation_is_well():
    result = subprocess.run([sys.executable, "-m", "qerl_verl.cli.main", "doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok ") == 7 and "FAIL" not in result.stdout
    assert "kernels of actor and critic here: PyTorch" in result.stdout or "Hopper" in result.stdout
    assert "+qerl=nvfp4: ready" in result.stdout and "+qerl=bf16: ready" in result.stdout
    assert ("+qerl=nf4: ready" in result.stdout) is (find_spec("bitsandbytes") is not None)


def test_a_plugin_policy_that_leaves_qerl_out_is_found(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    problems = dict(doctor.checks())
    assert "unset it or add qerl" in problems["vLLM's plugin policy"]
    assert "unset it or add qerl" in problems["verl's plugin policy"]
    assert next(problem for name, problem in problems.items() if name.startswith("Hydra composes +qerl=nvfp4 | "))


@pytest.mark.parametrize(("gpu", "build", "well"), [(True, "0.24.0", True), (False, "0.28.0+cpu", True),
                                                    (True, "0.28.0+cpu", False), (False, "0.24.0", False)])  # fmt: skip
def test_the_build_of_vllm_has_to_fit_the_device(monkeypatch, gpu, build, well):
    monkeypatch.setattr(doctor, "_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "version", lambda name: build)
    assert doctor._device_matches_vllm() is well
    assert ("CPU build" if gpu else "CUDA build") in doctor._device_problem()
