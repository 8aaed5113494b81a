"""The user's settings under ``qerl.*``, field by field. Importable without torch, verl or vLLM."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qerl_verl.config.arms import ARMS

KERNELS = ("auto", "hopper", "triton", "pytorch")
ROLLOUT_KERNELS = (*KERNELS, "marlin")
BASES = ("auto", "shared", "separate")
RECOMPUTE = ("auto", "full", "selective")
LORA_PATHS = ("inline", "punica")
PLATFORMS = ("auto", "cuda", "cpu")
ADAPTIVE = "adaptive"
SCHEDULES = ("exponential", "linear", "cosine", "logarithmic", ADAPTIVE)
NOISE_UNITS = ("absolute", "relative")
NOISE_ROUNDING = ("none", "weight")
QUANTIZATION_METHODS = ("auto", "rtn", "four-over-six", "gptq")


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
        sigma_start: standard deviation of the noise in the first noisy stage (in ``unit``). Above 0.
        sigma_end: standard deviation in the last stage. Above 0 and at most ``sigma_start``.
        num_stages: K. Stages of equal length over ``trainer.total_training_steps``; stage 0 has no noise, the last one
            has ``sigma_end``. At least 2. A run of fewer steps than stages has one stage a step.
        schedule: how sigma falls from ``sigma_start`` to ``sigma_end``: exponential (Eq. 8),
            linear, cosine or logarithmic; or ``adaptive``: no stages, sigma follows the measured
            divergence toward ``target_kl`` between the two.
        seed: with the trainer's step and the layer's name, determines the noise.
        unit: of sigma: ``absolute``, as in the paper, or ``relative`` to the root mean square of
            each norm's weight.
        rounding: of the noised weight: ``none``, it acts in float32 as drawn; ``weight``, it is
            rounded to the dtype of the norm's weight, which takes small noise off. That is what an
            implementation that writes the noise into a 16-bit weight does; for comparisons.
        router: whether the norm in front of a mixture's experts receives noise. It also feeds their
            router, so noise there moves tokens to other experts. Dense layers have no such norm.
        target_kl: divergence of the sampling policy from the clean one that ``schedule=adaptive``
            keeps, nats a token. Above 0 and below 1; None with the other schedules.
    """

    enable: bool = True
    sigma_start: float = 1e-2
    sigma_end: float = 5e-4
    num_stages: int = 10
    schedule: str = "exponential"
    seed: int = 42
    unit: str = "absolute"
    rounding: str = "none"
    router: bool = False
    target_kl: float | None = None


@dataclass(frozen=True)
class QuantizationSettings:
    """How a 16- or 32-bit model is quantized when a run begins. Each method and text has its own entry in the cache.

    Attributes:
        method: ``gptq`` rounds so that the outputs of each layer change least on a text; ``four-over-six`` rounds to
            nearest with the better of two scales for 16 weights; ``rtn`` rounds to nearest; ``auto`` is gptq where
            the driver has a GPU and there is text, else four-over-six.
        calibration: the text, a parquet, JSONL or text file; None takes prompts, and answers where there are any, of
            ``data.train_files``.
        samples: rows of it.
        sample_tokens: tokens of a row; what lies beyond is cut off.
    """

    method: str = "auto"
    calibration: str | None = None
    samples: int = 128
    sample_tokens: int = 512


@dataclass(frozen=True)
class RolloutSettings:
    """The NVFP4 layers of the rollout engine.

    Attributes:
        kernel: ``auto`` (for each layer the first of hopper, marlin, which is vLLM's, and pytorch
            that runs on the device and serves the layer), or one of these or ``triton`` to insist
            on, which is refused where it does not.
        lora: ``inline``, the adapter is part of the layer; ``punica``, vLLM's own LoRA path.
        sleep_level: what the engine keeps of the packed base while the actor trains: 1, in host memory; 2, nothing, it is
            read from disk again.
    """

    kernel: str = "auto"
    lora: str = "inline"
    sleep_level: int = 1


@dataclass(frozen=True)
class QeRLSettings:
    """Everything under ``qerl.*``.

    Attributes:
        arm: what the frozen base is stored in, see :mod:`qerl_verl.config.arms`. Set by the choice
            of ``+qerl=``.
        platform: ``cuda``, ``cpu``, or ``auto``: cuda where a GPU is visible or a Ray cluster is joined
            (``RAY_ADDRESS``, ``ray_kwargs.ray_init.address``), else cpu.
        cache_dir: folder of quantized checkpoints; None is ``$QERL_CACHE``, else ``~/.cache/qerl_verl``. On several nodes,
            a folder that all of them see.
        kernel: of the NVFP4 layers in actor and critic: ``auto`` (for each layer the first of
            hopper, triton, pytorch that runs on the device and serves the layer) or one of these to
            insist on, which is refused where it does not.
        recompute: what gradient checkpointing computes twice: ``full``, everything; ``selective``, all but the NVFP4 layers,
            whose outputs are kept; ``auto``, on a GPU selective for as many layers as free memory allows, else full.
        base: ``shared``, actor and rollout of a device use one copy of the frozen base; ``separate``, each
            has its own; ``auto``, shared on the CPU where the run allows it. On GPUs ``auto`` is
            separate, since sharing has not been measured there yet.
        quantization: how a model becomes NVFP4.
        rollout: the NVFP4 layers of the rollout engine.
        aqn: the noise.
    """

    arm: str = "nvfp4"
    platform: str = "auto"
    cache_dir: str | None = None
    kernel: str = "auto"
    recompute: str = "auto"
    base: str = "auto"
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
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
        if self.arm not in ARMS:
            out.append(f"qerl.arm={self.arm}: choose one of {', '.join(ARMS)}, with +qerl=ARM")
        if self.platform not in PLATFORMS:
            out.append(f"qerl.platform={self.platform}: choose one of {', '.join(PLATFORMS)}")
        if self.kernel not in KERNELS:
            out.append(f"qerl.kernel={self.kernel}: choose one of {', '.join(KERNELS)}")
        if self.recompute not in RECOMPUTE:
            out.append(f"qerl.recompute={self.recompute}: choose one of {', '.join(RECOMPUTE)}")
        if self.base not in BASES:
            out.append(f"qerl.base={self.base}: choose one of {', '.join(BASES)}")
        quantization = self.quantization
        if quantization.method not in QUANTIZATION_METHODS:
            out.append(
                f"qerl.quantization.method={quantization.method}: choose one of {', '.join(QUANTIZATION_METHODS)}"
            )
        for name, least in (("samples", 1), ("sample_tokens", 2)):
            if getattr(quantization, name) < least:
                out.append(f"qerl.quantization.{name}={getattr(quantization, name)}: at least {least}")
        rollout = self.rollout
        if rollout.kernel not in ROLLOUT_KERNELS:
            out.append(f"qerl.rollout.kernel={rollout.kernel}: choose one of {', '.join(ROLLOUT_KERNELS)}")
        if rollout.lora not in LORA_PATHS:
            out.append(f"qerl.rollout.lora={rollout.lora}: choose one of {', '.join(LORA_PATHS)}")
        if rollout.sleep_level not in (1, 2):
            out.append(f"qerl.rollout.sleep_level={rollout.sleep_level}: choose 1 or 2")
        if rollout.sleep_level == 2 and rollout.lora == "punica":
            out.append(
                "qerl.rollout.sleep_level=2: vLLM's own LoRA path loses its adapter slots then; use 1, or lora=inline"
            )
        if aqn.schedule not in SCHEDULES:
            out.append(f"qerl.aqn.schedule={aqn.schedule}: choose one of {', '.join(SCHEDULES)}")
        if aqn.unit not in NOISE_UNITS:
            out.append(f"qerl.aqn.unit={aqn.unit}: choose one of {', '.join(NOISE_UNITS)}")
        if aqn.rounding not in NOISE_ROUNDING:
            out.append(f"qerl.aqn.rounding={aqn.rounding}: choose one of {', '.join(NOISE_ROUNDING)}")
        out += _target_problems(aqn)
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


def _target_problems(aqn: AQNSettings) -> list[str]:
    target, key = aqn.target_kl, f"qerl.aqn.target_kl={aqn.target_kl}"
    if aqn.schedule != ADAPTIVE:
        if target is None:
            return []
        return [f"{key}: only qerl.aqn.schedule={ADAPTIVE} follows a target; set that, or remove the setting"]
    if target is None:
        return [f"qerl.aqn.schedule={ADAPTIVE}: sigma needs a divergence to follow; set qerl.aqn.target_kl, e.g. 1e-3"]
    if not 0 < target < 1:
        return [
            f"{key}: a divergence in nats a token, which noise on the norms keeps far below 1; give a number above 0 and "
            "below 1, e.g. 1e-3"
        ]
    return []


_GROUPS = {group.__name__: group for group in (AQNSettings, QuantizationSettings, RolloutSettings)}
_TYPES = {
    "bool": bool,
    "int": int,
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str": str,
    "str | None": (str, type(None)),
}


def _build(cls, values, path: str, problems: list[str]):
    if not isinstance(values, Mapping):
        problems.append(f"{path}={values!r}: expected a group of settings, got {type(values).__name__}")
        return cls()
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            problems.append(f"{path}.{key}: no such setting; known under {path}: {', '.join(fields)}")
        elif fields[key].type in _GROUPS:
            arguments[key] = _build(_GROUPS[fields[key].type], value, f"{path}.{key}", problems)
        else:
            expected = _TYPES[fields[key].type]
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                problems.append(f"{path}.{key}={value!r}: expected {fields[key].type}, got {type(value).__name__}")
            else:
                wants_float = fields[key].type.startswith("float") and value is not None
                arguments[key] = float(value) if wants_float else value
    return cls(**arguments)
