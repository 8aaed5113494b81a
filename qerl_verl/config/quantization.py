"""Chooses how a run quantizes an unquantized model: the method and its calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qerl_verl.config.arms import ARMS
from qerl_verl.config.keys import get_value
from qerl_verl.config.settings import QeRLSettings

KEY = "qerl.quantization"
TRAIN_FILES = "data.train_files"

_GAIN = (
    "once for a model; it keeps the policy closer to the 16-bit model (of SmolLM2-135M 0.04 nats "
    "a token away in KL divergence, four-over-six 0.21)"
)
_QUICK = f"{KEY}.method=four-over-six takes seconds"


@dataclass(frozen=True)
class Choice:
    """A method and its inputs.

    Attributes:
        method: see :data:`qerl_verl.nvfp4.quantizers.Method`.
        reason: why it was chosen.
        files: calibration text; empty for a method that needs none.
        text_from: the key that names ``files``.
        device: ``cuda`` or ``cpu``.
        samples, sample_tokens, prompt_key, chat_template: see
            :func:`qerl_verl.nvfp4.calibration.read_calibration`.
    """

    method: str = "four-over-six"
    reason: str = ""
    files: tuple[str, ...] = ()
    text_from: str = ""
    device: str = "cpu"
    samples: int = 128
    sample_tokens: int = 512
    prompt_key: str = "prompt"
    chat_template: str | None = None

    @property
    def line(self) -> str:
        """Returns a line for the user, printed before the quantization begins."""
        if self.method == "gptq":
            how = f"gptq with {self.samples} rows of {self.text_from} ({self.reason}); takes minutes, {_GAIN}; {_QUICK}"
        elif self.method == "four-over-six":
            how = (
                f"four-over-six ({self.reason}); takes about half a minute for a billion weights "
                f"on two cores; {KEY}.method=gptq takes minutes on a GPU, far longer without one, "
                f"{_GAIN}"
            )
        else:
            how = f"{self.method} ({self.reason})"
        return f"quantization of a model that is not NVFP4 yet: {how}"


def choose_quantization(config: DictConfig, settings: QeRLSettings, gpu: bool) -> Choice | None:
    """Returns the method of a run; None if the run's arm stores no quantized checkpoint (all arms
    but NVFP4).

    ``auto`` is GPTQ if the driver has a GPU and the run has text, which its training data are, else
    four-over-six.

    Args:
        config: verl's configuration.
        settings: settings of the run.
        gpu: whether the driver has a GPU.
    """
    if not ARMS[settings.arm].container:
        return None
    wanted = settings.quantization
    if settings.arm == "mxfp4":
        return Choice("mxfp4", "the arm's own", device="cuda" if gpu else "cpu")
    files, text_from = _as_files(wanted.calibration), f"{KEY}.calibration"
    # such a class reads what only it knows
    if not files and get_value(config, "data.custom_cls.path") is None:
        files, text_from = _as_files(get_value(config, TRAIN_FILES)), TRAIN_FILES
    method, reason = wanted.method, f"{KEY}.method"
    if method == "auto":
        method = "gptq" if gpu and files else "four-over-six"
        reason = "auto, on a GPU" if gpu and files else "no GPU" if not gpu else "no text to calibrate with"
    if method != "gptq":
        files = ()
    return Choice(
        method,
        reason,
        files,
        text_from,
        "cuda" if gpu else "cpu",
        wanted.samples,
        wanted.sample_tokens,
        get_value(config, "data.prompt_key") or "prompt",
        get_value(config, "actor_rollout_ref.model.custom_chat_template"),
    )


def find_problems(choice: Choice, here: bool = True) -> list[str]:
    """Returns why the method cannot be used, one sentence each; training files have checks of their
    own.

    Args:
        here: False if the run takes place on another machine, whose files cannot be checked.
    """
    if choice.method != "gptq":
        return []
    if not choice.files:
        return [
            f"{KEY}.method=gptq needs text, and {TRAIN_FILES} has none that can be read here: set "
            f"{KEY}.calibration to a parquet, JSONL or text file, or the method to four-over-six"
        ]
    if choice.text_from == TRAIN_FILES or not here:
        return []
    missing = [file for file in choice.files if "://" not in file and not Path(file).expanduser().is_file()]
    return [f"{KEY}.calibration={file}: there is no such file" for file in missing]


def _as_files(value: Any) -> tuple[str, ...]:
    if OmegaConf.is_list(value):
        return tuple(str(item) for item in value)
    return () if value is None else (str(value),)
