"""Declares the user's settings under ``qerl.*``. No other place declares them.

The YAML file of the Hydra group and the table in docs/settings.md are written from these classes
by ``python -m qerl_verl.config.generate``.

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qerl_verl.config.schema import Row, SettingsError, build, group, rows, setting

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = [
    "AQNSettings",
    "QeRLSettings",
    "QuantizationSettings",
    "RolloutSettings",
    "SettingsError",
]

Format = Literal["nvfp4", "mxfp4", "bf16", "nf4"]
Kernel = Literal["auto", "hopper", "triton", "pytorch"]
Unit = Literal["absolute", "relative"]
Rounding = Literal["none", "weight"]
RolloutKernel = Literal["auto", "hopper", "triton", "pytorch", "marlin"]

KERNELS: tuple[str, ...] = typing.get_args(Kernel)
ROLLOUT_KERNELS: tuple[str, ...] = typing.get_args(RolloutKernel)
ADAPTIVE = "adaptive"

RECORDED = ("source_models", "base_fingerprint", "policy")
"""Keys that the driver adds to the ``qerl`` node: facts for the records of the run and of its
checkpoints, no settings."""

_NO_NOISE = "to run without noise set qerl.aqn.enable=False"


@dataclass(frozen=True)
class AQNSettings:
    """Adaptive Quantization Noise (QeRL, arXiv 2510.11696, section 3.3)."""

    enable: bool = setting(
        True,
        "adds Gaussian noise per channel to RMSNorm weights of the rollout policy",
        defines_policy=True,
    )
    sigma_start: float = setting(
        1e-2,
        "standard deviation of the noise in the first noisy stage, in `unit`",
        above=0,
        advice=_NO_NOISE,
        defines_policy=True,
    )
    sigma_end: float = setting(
        5e-4,
        "standard deviation in the last stage; at most `sigma_start`",
        above=0,
        advice=_NO_NOISE,
        defines_policy=True,
    )
    num_stages: int = setting(
        10,
        "stages of equal length over `trainer.total_training_steps`. The first has no noise and "
        "the last has `sigma_end`. A run of fewer steps than stages has one stage per step",
        at_least=2,
        advice=f"stage 0 has no noise; {_NO_NOISE}",
        defines_policy=True,
    )
    schedule: Literal["exponential", "linear", "cosine", "logarithmic", "adaptive"] = setting(
        "exponential",
        "how sigma falls from `sigma_start` to `sigma_end`. `exponential` is the paper's (Eq. 8). "
        "`adaptive` has no stages: sigma follows `target_kl` between the two bounds",
        defines_policy=True,
    )
    seed: int = setting(42, "determines the noise, together with the step and the layer", defines_policy=True)
    unit: Unit = setting(
        "absolute",
        "unit of sigma: `absolute`, as in the paper, or `relative` to the root mean square of each "
        "norm's weight, which differs by an order of magnitude between models. A line at the start "
        "of the run tells both",
        defines_policy=True,
    )
    rounding: Rounding = setting(
        "none",
        "`none`: the noise acts in float32 as it is drawn. `weight`: the noised weight is rounded "
        "to the dtype of the norm's weight, as in implementations that write the noise into a "
        "16-bit weight; for comparisons",
        defines_policy=True,
    )
    router: bool = setting(
        False,
        "adds noise to the norm in front of the experts of a mixture, which also feeds their "
        "router ([models.md](models.md))",
        defines_policy=True,
    )
    target_kl: float | None = setting(
        None,
        "divergence of the sampling policy from the clean one that `schedule=adaptive` holds, in nats per token",
        above=0,
        below=1,
        advice="it is in nats per token, and noise on the norms keeps it far below 1, e.g. 1e-3",
        defines_policy=True,
    )


@dataclass(frozen=True)
class QuantizationSettings:
    """How a 16- or 32-bit model is quantized when a run begins. The cache has one entry for each
    method and text."""

    method: Literal["auto", "rtn", "four-over-six", "gptq"] = setting(
        "auto",
        "`gptq` minimizes the change of each layer's output on a text. `four-over-six` rounds to "
        "nearest with the better of two scales per block of 16 weights. `rtn` rounds to nearest. "
        "`auto` is `gptq` where the driver has a GPU and there is text, else `four-over-six`",
        scope="quantization",
    )
    calibration: str | None = setting(
        None,
        "text for `gptq`: a parquet, JSONL or text file. `null` takes prompts, and answers where "
        "there are any, from `data.train_files`",
        scope="quantization",
    )
    samples: int = setting(128, "rows of the text", at_least=1, scope="quantization")
    sample_tokens: int = setting(
        512, "tokens per row; the rest of a longer row is cut off", at_least=2, scope="quantization"
    )


@dataclass(frozen=True)
class RolloutSettings:
    """The NVFP4 layers of the rollout engine."""

    kernel: RolloutKernel = setting(
        "auto",
        "kernels of the NVFP4 layers in the rollout. `marlin` is vLLM's. `auto` takes for each "
        "layer the first of hopper, marlin and pytorch that runs on the device and serves the "
        "layer. A named kernel that does not is refused",
        scope="packed",
    )
    lora: Literal["inline", "punica"] = setting(
        "inline",
        "`inline`: the adapter is part of the NVFP4 layer. `punica`: vLLM's own LoRA path",
        scope="packed",
    )
    sleep_level: Literal[1, 2] = setting(
        1,
        "where the rollout's base is while the actor trains: 1 keeps it in host memory, 2 reads it "
        "from disk again. A base that actor and rollout share stays where it is",
        scope="packed",
    )
    compile_cache: bool = setting(
        False,
        "keeps what vLLM compiles for the next start, which verl turns off "
        "([performance-start.md](performance-start.md)). Each engine of a node has a folder of "
        "its own in `$QERL_KERNEL_CACHE`, or `~/.cache/qerl_verl/kernels` without it",
    )


@dataclass(frozen=True)
class QeRLSettings:
    """Everything under ``qerl.*``."""

    arm: Format = setting(
        "nvfp4",
        "format in which the frozen base is stored ([arms.md](arms.md)); the choice of `+qerl=` sets it",
        advice="with +qerl=ARM",
        defines_policy=True,
        chosen_by_group=True,
    )
    platform: Literal["auto", "cuda", "cpu"] = setting(
        "auto", "`auto` is `cuda` where a GPU is visible or a Ray cluster is joined, else `cpu`"
    )
    cache_dir: str | None = setting(
        None,
        "folder of quantized checkpoints. `null` is `$QERL_CACHE`, or `~/.cache/qerl_verl` without "
        "it. On several nodes it has to be a folder that all of them see",
    )
    kernel: Kernel = setting(
        "auto",
        "kernels of the NVFP4 layers in actor and critic. `auto` takes for each layer the first of "
        "hopper, triton and pytorch that runs on the device and serves the layer. A named kernel "
        "that does not is refused",
        scope="packed",
    )
    recompute: Literal["auto", "full", "selective"] = setting(
        "auto",
        "activation checkpointing: `full` recomputes every layer, `selective` keeps the outputs of "
        "the NVFP4 layers, and `auto` keeps the outputs of as many layers as free GPU memory "
        "allows",
        scope="packed",
    )
    base: Literal["auto", "shared", "separate"] = setting(
        "auto",
        "`shared`: actor and rollout of a device use one copy of the frozen base. `separate`: each "
        "has its own. `auto` shares on the CPU where the run allows it, and not on GPUs, where "
        "sharing has not been measured",
        scope="packed",
    )
    quantization: QuantizationSettings = group(
        QuantizationSettings, "how a model that is not in NVFP4 yet is quantized"
    )
    rollout: RolloutSettings = group(RolloutSettings, "the NVFP4 layers of the rollout engine")
    aqn: AQNSettings = group(AQNSettings, "Adaptive Quantization Noise")

    @classmethod
    def of(cls, config: DictConfig) -> QeRLSettings:
        """Returns the settings of a composed configuration, without the values that the driver has
        recorded there.

        Raises:
            SettingsError: see :meth:`from_mapping`.
        """
        from omegaconf import OmegaConf

        node = OmegaConf.to_container(config.qerl, resolve=True)
        return cls.from_mapping({k: v for k, v in node.items() if k not in RECORDED})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> QeRLSettings:
        """Builds and checks the settings.

        Args:
            values: the content of the ``qerl`` node.

        Raises:
            SettingsError: unknown keys, wrong types, values out of range, and settings that
                contradict each other; all of them at once.
        """
        problems: list[str] = []
        settings = build(cls, values, "qerl", problems)
        if problems := problems or find_contradictions(settings):
            raise SettingsError(problems)
        return settings


SETTINGS: dict[str, Row] = {row.key: row for row in rows(QeRLSettings, "qerl") if not row.is_group}
"""Dotted key -> declaration of every setting."""


def keys_of_scope(*scopes: str) -> list[str]:
    """Returns the dotted keys of the settings that concern one of these kinds of runs
    (:class:`~.schema.Setting`).
    """
    return [key for key, row in SETTINGS.items() if row.setting.scope in scopes]


def find_contradictions(settings: QeRLSettings) -> list[str]:
    """Returns the contradictions between settings that are each allowed, one sentence each."""
    aqn, rollout, out = settings.aqn, settings.rollout, []
    if rollout.sleep_level == 2 and rollout.lora == "punica":
        out.append(
            "qerl.rollout.sleep_level=2: vLLM's own LoRA path loses its adapter slots then; use 1, or lora=inline"
        )
    if aqn.sigma_start < aqn.sigma_end:
        out.append(
            f"qerl.aqn.sigma_end={aqn.sigma_end} is above qerl.aqn.sigma_start={aqn.sigma_start}: "
            "the noise decays, so sigma_end must be at most sigma_start"
        )
    if aqn.schedule == ADAPTIVE and aqn.target_kl is None:
        out.append(
            f"qerl.aqn.schedule={ADAPTIVE}: sigma needs a divergence to follow; set qerl.aqn.target_kl, e.g. 1e-3"
        )
    if aqn.schedule != ADAPTIVE and aqn.target_kl is not None:
        out.append(
            f"qerl.aqn.target_kl={aqn.target_kl}: only qerl.aqn.schedule={ADAPTIVE} follows a "
            "target; set that, or remove the setting"
        )
    return out
