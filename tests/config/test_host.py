"""The platform follows from the setting and from what the machine has."""

import pytest

from qerl_verl.config.host import Host, choose_platform
from qerl_verl.config.settings import SettingsError


@pytest.mark.parametrize(
    ("setting", "gpus", "cpu_vllm", "joins", "expected"),
    [
        ("auto", 1, False, False, "cuda"),
        ("auto", 0, True, False, "cpu"),
        ("auto", 0, False, True, "cuda"),
        ("auto", 0, True, True, "cpu"),
        ("cpu", 1, True, False, "cpu"),
        ("auto", 0, False, False, "no GPU is visible and the installed vLLM is a CUDA build"),
        ("cuda", 1, True, False, "the installed vLLM is the CPU build"),
        ("cpu", 1, False, False, "CUDA build"),
    ],
)
def test_the_platform_is_chosen_by_what_is_there(setting, gpus, cpu_vllm, joins, expected):
    host = Host(cpus=8, gpus=gpus, cpu_vllm=cpu_vllm)
    if expected in ("cuda", "cpu"):
        assert choose_platform(setting, host, joins)[0] == expected
    else:
        with pytest.raises(SettingsError, match=expected):
            choose_platform(setting, host, joins)
