"""The user's settings under ``qerl.*``, field by field. Importable without torch, verl or vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLATFORMS = ("auto", "cuda", "cpu")
SCHEDULES = ("exponential", "linear", "cosine", "logarithmic")


class SettingsError(ValueError):
    """A combination of settings that cannot run. ``problems`` lists each one, with the key and the cure."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class AQNSettings:
    """Adaptive Quantization Noise (QeRL, arXiv 2510.11696, section 3.3).

    Attributes:
        enable: False keeps the rollout policy clean at every step.
        sigma_start: standard deviation of the noise in the first noisy stage (an RMSNorm weight is about 1). Above 0.
        sigma_end: standard deviation in the last stage. Above 0 and at most ``sigma_start``.
        num_stages: K. Stages of equal length over ``trainer.total_training_steps``; stage 0 has no noise, the last one
            has ``sigma_end``. At least 2. A run of fewer steps than stages has one stage a step.
        schedule: how sigma falls from ``sigma_start`` to ``sigma_end``: exponential (Eq. 8), linear, cosine or logarithmic.
        seed: with the trainer's step and the layer's name, determines the noise.
    """

    enable: bool = True
    sigma_start: float = 1e-2
    sigma_end: float = 5e-4
    num_stages: int = 10
    schedule: str = "exponential"
    seed: int = 42


@dataclass(frozen=True)
class QeRLSettings:
    """Everything under ``qerl.*``.

    Attributes:
        platform: ``cuda``, ``cpu``, or ``auto``: cuda where a GPU is visible or a Ray cluster is joined
            (``RAY_ADDRESS``, ``ray_kwargs.ray_init.address``), else cpu.
        cache_dir: folder of quantized checkpoints; None is ``$QERL_CACHE``, else ``~/.cache/qerl_verl``. On several nodes,
            a folder that all of them see.
        aqn: the noise.
    """

    platform: str = "auto"
    cache_dir: str | None = None
    aqn: AQNSettings = field(default_factory=AQNSettings)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> QeRLSettings:
        """Build and check the settings.

        Args:
            values: the content of the ``qerl`` node.

        Raises:
            SettingsError: unknown keys, wrong types or values out of range, all of them at once.
        """
        problems: list[str] = []
        settings = _build(cls, values, "qerl", problems)
        if not problems:
            problems = settings._problems()
        if problems:
            raise SettingsError(problems)
        return settings

    def _problems(self) -> list[str]:
        aqn, out = self.aqn, []
        if self.platform not in PLATFORMS:
            out.append(f"qerl.platform={self.platform}: choose one of {', '.join(PLATFORMS)}")
        if aqn.schedule not in SCHEDULES:
            out.append(f"qerl.aqn.schedule={aqn.schedule}: choose one of {', '.join(SCHEDULES)}")
        for name in ("sigma_start", "sigma_end"):
            value = getattr(aqn, name)
            if not 0 < value < float("inf"):
                out.append(
                    f"qerl.aqn.{name}={value}: must be a positive number; to run without noise set qerl.aqn.enable=False"
                )
        if 0 < aqn.sigma_start < aqn.sigma_end:
            out.append(
                f"qerl.aqn.sigma_end={aqn.sigma_end} is above qerl.aqn.sigma_start={aqn.sigma_start}: the noise decays, "
                "so sigma_end must be at most sigma_start"
            )
        if aqn.num_stages < 2:
            out.append(
                f"qerl.aqn.num_stages={aqn.num_stages}: at least 2 are needed, since stage 0 is without noise; to run "
                "without noise set qerl.aqn.enable=False"
            )
        return out


_TYPES = {"bool": bool, "int": int, "float": (int, float), "str": str, "str | None": (str, type(None))}


def _build(cls, values, path: str, problems: list[str]):
    if not isinstance(values, Mapping):
        problems.append(f"{path}={values!r}: expected a group of settings, got {type(values).__name__}")
        return cls()
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(f"{path}.{key}: no such setting; known under {path}: {', '.join(fields)}")
        elif fields[key].type == "AQNSettings":
            arguments[key] = _build(AQNSettings, value, f"{path}.{key}", problems)
        else:
            expected = _TYPES[fields[key].type]
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                problems.append(f"{path}.{key}={value!r}: expected {fields[key].type}, got {type(value).__name__}")
            else:
                arguments[key] = float(value) if fields[key].type == "float" else value
    return cls(**arguments)
