"""The user's settings: every field's range, and errors that name the key and the fix."""

import subprocess
import sys

import pytest

from qerl_verl.config.arms import ARMS
from qerl_verl.config.settings import SETTINGS, AQNSettings, QeRLSettings, SettingsError


def problems_of(**values):
    with pytest.raises(SettingsError) as caught:
        QeRLSettings.from_mapping(values)
    return caught.value.problems


def test_defaults_are_the_papers():
    settings = QeRLSettings.from_mapping({})
    assert settings.aqn == AQNSettings(
        enable=True,
        sigma_start=1e-2,
        sigma_end=5e-4,
        num_stages=10,
        schedule="exponential",
        seed=42,
        unit="absolute",
        rounding="none",
        router=False,
        target_kl=None,
    )
    assert settings.platform == "auto" and settings.cache_dir is None


def test_the_formats_are_those_of_the_arms():
    assert SETTINGS["qerl.arm"].choices == tuple(ARMS)


def test_values_are_taken_over():
    settings = QeRLSettings.from_mapping({"cache_dir": "/x", "aqn": {"sigma_start": 1, "num_stages": 2}})
    assert settings.cache_dir == "/x" and settings.aqn.sigma_start == 1.0 and settings.aqn.num_stages == 2


@pytest.mark.parametrize(
    ("values", "key", "fix"),
    [
        (
            {"sigma_stat": 1},
            "qerl.sigma_stat",
            "known under qerl: arm, platform, cache_dir, kernel, recompute, base, quantization, rollout, aqn",
        ),
        ({"aqn": {"sigma": 1}}, "qerl.aqn.sigma", "known under qerl.aqn: enable, sigma_start, sigma_end"),
        ({"kernal": "auto"}, "qerl.kernal: no such setting", "did you mean qerl.kernel?"),
        ({"seed": 1}, "qerl.seed: no such setting", "did you mean qerl.aqn.seed?"),
        ({"aqn": {"sigma_strat": 1}}, "qerl.aqn.sigma_strat: no such setting", "did you mean qerl.aqn.sigma_start?"),
        ({"aqn": {"zzz": 1}}, "qerl.aqn.zzz", "no such setting; known under"),
        ({"aqn": {"sigma_start": float("inf")}}, "qerl.aqn.sigma_start=inf", "must be above 0 and finite"),
        ({"aqn": {"seed": True}}, "qerl.aqn.seed=True", "expected int, got bool"),
        ({"rollout": {"sleep_level": True}}, "qerl.rollout.sleep_level=True", "choose one of 1, 2"),
        ({"cache_dir": 3}, "qerl.cache_dir=3", "expected str | None, got int"),
        ({"kernel": 3}, "qerl.kernel=3", "choose one of auto, hopper, triton, pytorch"),
        ({"aqn": {"sigma_start": 0}}, "qerl.aqn.sigma_start=0: must be above 0", "qerl.aqn.enable=False"),
        ({"aqn": {"sigma_end": -1e-3}}, "qerl.aqn.sigma_end=-0.001", "must be above 0"),
        ({"aqn": {"sigma_start": float("nan")}}, "qerl.aqn.sigma_start=nan", "must be above 0"),
        ({"aqn": {"sigma_start": 1e-4, "sigma_end": 1e-3}}, "qerl.aqn.sigma_end=0.001", "at most sigma_start"),
        ({"aqn": {"num_stages": 1}}, "qerl.aqn.num_stages=1", "must be at least 2; stage 0 has no noise"),
        ({"aqn": {"schedule": "step"}}, "qerl.aqn.schedule=step", "cosine"),
        ({"aqn": {"unit": "percent"}}, "qerl.aqn.unit=percent", "choose one of absolute, relative"),
        ({"aqn": {"rounding": "up"}}, "qerl.aqn.rounding=up", "choose one of none, weight"),
        ({"aqn": {"schedule": "adaptive"}}, "qerl.aqn.schedule=adaptive", "set qerl.aqn.target_kl"),
        ({"aqn": {"target_kl": 1e-3}}, "qerl.aqn.target_kl=0.001", "only qerl.aqn.schedule=adaptive follows a target"),
        ({"aqn": {"schedule": "adaptive", "target_kl": 0}}, "qerl.aqn.target_kl=0", "above 0 and below 1"),
        ({"aqn": {"schedule": "adaptive", "target_kl": float("nan")}}, "qerl.aqn.target_kl=nan", "above 0 and below 1"),
        ({"aqn": {"schedule": "adaptive", "target_kl": 5}}, "qerl.aqn.target_kl=5", "above 0 and below 1"),
        ({"aqn": {"schedule": "adaptive", "target_kl": "low"}}, "qerl.aqn.target_kl='low'", "expected float | None"),
        ({"aqn": {"num_stages": 2.5}}, "qerl.aqn.num_stages=2.5", "expected int"),
        ({"aqn": {"enable": "yes"}}, "qerl.aqn.enable='yes'", "expected bool"),
        ({"aqn": 3}, "qerl.aqn=3", "group of settings"),
        ({"arm": "fp8"}, "qerl.arm=fp8", "choose one of nvfp4, mxfp4, bf16, nf4"),
        ({"platform": "tpu"}, "qerl.platform=tpu", "cuda"),
        ({"kernel": "marlin"}, "qerl.kernel=marlin", "hopper"),
        ({"recompute": "none"}, "qerl.recompute=none", "choose one of auto, full, selective"),
        ({"base": "copy"}, "qerl.base=copy", "choose one of auto, shared, separate"),
        ({"quantization": {"method": "awq"}}, "qerl.quantization.method=awq", "four-over-six, gptq"),
        ({"quantization": {"samples": 0}}, "qerl.quantization.samples=0", "at least 1"),
        ({"quantization": {"sample_tokens": 1}}, "qerl.quantization.sample_tokens=1", "at least 2"),
        ({"rollout": {"kernel": "cutlass"}}, "qerl.rollout.kernel=cutlass", "marlin"),
        ({"rollout": {"lora": "merged"}}, "qerl.rollout.lora=merged", "punica"),
        ({"rollout": {"sleep_level": 3}}, "qerl.rollout.sleep_level=3", "choose one of 1, 2"),
        ({"rollout": {"sleep_level": 2, "lora": "punica"}}, "qerl.rollout.sleep_level=2", "lora=inline"),
    ],
)
def test_a_bad_value_is_named_with_its_cure(values, key, fix):
    (problem,) = problems_of(**values)
    assert key in problem and fix in problem


def test_all_problems_are_reported_at_once():
    assert len(problems_of(nope=1, aqn={"sigma": 1, "num_stages": "a"})) == 3


def test_importing_the_settings_needs_no_torch():
    code = "import qerl_verl.config.settings, qerl_verl.config.rules, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
