"""Whether verl and vLLM would load QeRL, and whether the installed versions are known to work."""

import pytest

from qerl_verl.config.checks import plugins


@pytest.mark.parametrize(
    ("environment", "job", "expected"),
    [
        ({}, {}, []),
        ({"VERL_USE_EXTERNAL_PLUGINS": " Auto", "VLLM_PLUGINS": "other,qerl"}, {}, []),
        ({"VERL_USE_EXTERNAL_PLUGINS": "other, qerl"}, {}, []),
        ({"VERL_USE_EXTERNAL_PLUGINS": "none"}, {}, ["VERL_USE_EXTERNAL_PLUGINS=none keeps verl"]),
        ({"VERL_USE_EXTERNAL_PLUGINS": "other"}, {}, ["VERL_USE_EXTERNAL_PLUGINS=other keeps verl"]),
        ({}, {"VERL_USE_EXTERNAL_PLUGINS": "none"}, ["VERL_USE_EXTERNAL_PLUGINS=none keeps verl"]),
        ({"VLLM_PLUGINS": ""}, {}, ["VLLM_PLUGINS= keeps vLLM"]),
        ({"VLLM_PLUGINS": "other"}, {}, ["VLLM_PLUGINS=other keeps vLLM"]),
        # vLLM keeps the blank
        ({"VLLM_PLUGINS": "other, qerl"}, {}, ["VLLM_PLUGINS=other, qerl keeps vLLM"]),
        ({}, {"VLLM_PLUGINS": "other"}, ["VLLM_PLUGINS=other keeps vLLM"]),
        ({"VLLM_PLUGINS": "a"}, {"VLLM_PLUGINS": "qerl"}, ["VLLM_PLUGINS=a keeps vLLM"]),
        (
            {"VERL_USE_EXTERNAL_PLUGINS": "none", "VLLM_PLUGINS": ""},
            {},
            ["VERL_USE_EXTERNAL_PLUGINS=none keeps verl", "VLLM_PLUGINS= keeps vLLM"],
        ),
    ],
)
def test_variables_that_keep_the_plugin_out(environment, job, expected):
    problems = plugins.find_problems(environment, job)
    assert len(problems) == len(expected), problems
    for problem, start in zip(problems, expected, strict=True):
        assert problem.startswith(start) and "unset it or add qerl to its list" in problem


def test_vllm_reads_the_list_as_the_check_does(monkeypatch):
    from vllm import envs
    from vllm.plugins import load_plugins_by_group

    for names, loaded in (("other, qerl", False), ("other,qerl", True), ("", False)):
        monkeypatch.setenv("VLLM_PLUGINS", names)
        assert ("qerl" in envs.VLLM_PLUGINS) is loaded
        assert bool(plugins.vllm_policy_problem({"VLLM_PLUGINS": names})) is not loaded
        assert ("qerl" in load_plugins_by_group("vllm.general_plugins")) is loaded
