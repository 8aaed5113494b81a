"""The user's settings: every field's range, and errors that name the key and the cure."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qerl_verl.config.keys import flatten
from qerl_verl.config.settings import AQNSettings, QeRLSettings, SettingsError

ROOT = Path(__file__).parents[2]


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


def test_the_page_and_the_group_of_hydra_have_every_setting_with_its_default():
    """But for ``qerl.arm``, which the choice of the group's file sets."""
    settings = flatten(OmegaConf.structured(QeRLSettings()), "qerl")
    del settings["qerl.arm"]
    group = flatten(OmegaConf.load(ROOT / "qerl_verl/config/qerl_common.yaml").qerl, "qerl")
    del group["qerl.arm"]
    assert group == settings
    rows = re.findall(r"^\| `(qerl\.\S+)` \| `(.+?)` \|", (ROOT / "docs/settings.md").read_text(), re.M)
    as_yaml = {name: OmegaConf.create({"value": settings[name]}) for name, _ in rows if name in settings}
    found = {name: OmegaConf.create(f"value: {value}") for name, value in rows}
    assert found == as_yaml and found.keys() == settings.keys()


def test_values_are_taken_over():
    settings = QeRLSettings.from_mapping({"cache_dir": "/x", "aqn": {"sigma_start": 1, "num_stages": 2}})
    assert settings.cache_dir == "/x" and settings.aqn.sigma_start == 1.0 and settings.aqn.num_stages == 2


@pytest.mark.parametrize(
    ("values", "key", "cure"),
    [
        (
            {"sigma_stat": 1},
            "qerl.sigma_stat",
            "known under qerl: arm, platform, cache_dir, kernel, recompute, base, quantization, rollout, aqn",
        ),
        ({"aqn": {"sigma": 1}}, "qerl.aqn.sigma", "sigma_start"),
        ({"aqn": {"sigma_start": 0}}, "qerl.aqn.sigma_start=0", "qerl.aqn.enable=False"),
        ({"aqn": {"sigma_end": -1e-3}}, "qerl.aqn.sigma_end=-0.001", "positive"),
        ({"aqn": {"sigma_start": float("nan")}}, "qerl.aqn.sigma_start=nan", "positive"),
        ({"aqn": {"sigma_start": 1e-4, "sigma_end": 1e-3}}, "qerl.aqn.sigma_end=0.001", "at most sigma_start"),
        ({"aqn": {"num_stages": 1}}, "qerl.aqn.num_stages=1", "At least 2".lower()),
        ({"aqn": {"schedule": "step"}}, "qerl.aqn.schedule=step", "cosine"),
        ({"aqn": {"unit": "percent"}}, "qerl.aqn.unit=percent", "choose one of absolute, relative"),
        ({"aqn": {"rounding": "up"}}, "qerl.aqn.rounding=up", "choose one of none, weight"),
        ({"aqn": {"schedule": "adaptive"}}, "qerl.aqn.schedule=adaptive", "set qerl.aqn.target_kl"),
        ({"aqn": {"target_kl": 1e-3}}, "qerl.aqn.target_kl=0.001", "only qerl.aqn.schedule=adaptive follows a target"),
        ({"aqn": {"schedule": "adaptive", "target_kl": 0}}, "qerl.aqn.target_kl=0.0", "above 0 and below 1"),
        ({"aqn": {"schedule": "adaptive", "target_kl": float("nan")}}, "qerl.aqn.target_kl=nan", "above 0 and below 1"),
        ({"aqn": {"schedule": "adaptive", "target_kl": 5}}, "qerl.aqn.target_kl=5.0", "above 0 and below 1"),
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
        ({"rollout": {"sleep_level": 3}}, "qerl.rollout.sleep_level=3", "choose 1 or 2"),
        ({"rollout": {"sleep_level": 2, "lora": "punica"}}, "qerl.rollout.sleep_level=2", "lora=inline"),
    ],
)
def test_a_bad_value_is_named_with_its_cure(values, key, cure):
    (problem,) = problems_of(**values)
    assert key in problem and cure in problem


def test_all_problems_are_reported_at_once():
    assert len(problems_of(nope=1, aqn={"sigma": 1, "num_stages": "a"})) == 3


def test_importing_the_settings_needs_no_torch():
    code = "import qerl_verl.config.settings, qerl_verl.config.rules, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
