"""Defines what the processes of a run learn from its driver: one :class:`Job`, as JSON in
``QERL_JOB``.

The driver puts the variable into Ray's runtime environment, which reaches every actor of the run on
every node. Their children inherit it, vLLM's engine processes among them. A process without the
variable does not belong to a run with the switch.

An engine of vLLM must be distinguished from others in the same process tree (a reward model's), and
vLLM names compiled graphs by a hash of its configuration. The part of the document that decides how
an engine computes, :class:`RolloutLayers`, is therefore also the entry ``qerl`` of the engine's
``additional_config``. The server refuses an entry that differs from the document.

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qerl_verl import __version__
from qerl_verl.config.settings import QeRLSettings, SettingsError

JOB_ENV = "QERL_JOB"
"""Name of the environment variable with the document."""

ADDITIONAL_CONFIG = "qerl"
"""Name of the entry in vLLM's ``additional_config``."""


class JobError(RuntimeError):
    """The document is absent, or this installation cannot follow it."""


@dataclass(frozen=True)
class LoraSettings:
    """The adapter in the layers of the rollout, which have buffers of its size from the start.

    Attributes:
        rank: of the adapter; the buffers are padded with zeros to the backend's multiple.
        alpha: ``lora_alpha``; the LoRA delta is scaled by alpha / rank.
        experts: whether the experts of a mixture have an adapter, too.
    """

    rank: int
    alpha: float
    experts: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class RolloutLayers:
    """How an engine of the rollout computes.

    Attributes:
        kernel: ``qerl.rollout.kernel``; without effect on a base that is not packed.
        lora: the adapter in the layers; None where vLLM's own LoRA path serves it.
        sleep_level: ``qerl.rollout.sleep_level``.
        noise: ``qerl.aqn.enable``: whether the norms can take noise.
    """

    kernel: str = "auto"
    lora: LoraSettings | None = None
    sleep_level: int = 1
    noise: bool = False

    def additional_config(self) -> dict[str, dict[str, Any]]:
        """Returns the entry for vLLM's ``additional_config``."""
        return {ADDITIONAL_CONFIG: dataclasses.asdict(self)}

    @classmethod
    def of_engine(cls, additional_config: Mapping[str, Any] | None) -> RolloutLayers | None:
        """Reads an engine's ``additional_config``; returns None for an engine that is not the
        rollout's.

        Raises:
            JobError: the entry has a key that this version does not know.
        """
        node = (additional_config or {}).get(ADDITIONAL_CONFIG)
        if node is None:
            return None
        if unknown := sorted(set(node) - {f.name for f in dataclasses.fields(cls)}):
            raise JobError(f"additional_config.{ADDITIONAL_CONFIG}: unknown {', '.join(unknown)}")
        lora = node.get("lora")
        values = {
            **node,
            "lora": lora and LoraSettings(int(lora["rank"]), float(lora["alpha"]), bool(lora.get("experts"))),
        }
        return cls(**values)


@dataclass(frozen=True)
class BaseSharing:
    """One copy of the frozen base for actor and rollout of a device.

    Attributes:
        key: of the job: names the owner's socket and opens it.
        model: ``actor_rollout_ref.model.path`` after quantization: a critic of the same checkpoint
            uses its base.
    """

    key: str = ""
    model: str = ""


@dataclass(frozen=True)
class Job:
    """A run with the switch, as its processes see it.

    Attributes:
        settings: everything under ``qerl.*``.
        lora: the adapter in the layers of the rollout; None where vLLM's own LoRA path serves it.
        dtype: ``actor_rollout_ref.rollout.dtype``.
        sharing: where actor and rollout use one copy of the base; None where each has its own.
        sources: role (actor, critic) -> name or path of the model as the user gave it, for the
            adapters that training workers save.
        replay: ``actor_rollout_ref.rollout.enable_rollout_routing_replay``: whether the actor sends
            tokens to the experts that the rollout chose.
    """

    settings: QeRLSettings = field(default_factory=QeRLSettings)
    lora: LoraSettings | None = None
    dtype: str = "bfloat16"
    sharing: BaseSharing | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    replay: bool = False

    @property
    def layers(self) -> RolloutLayers:
        """Returns the settings for the rollout's engines."""
        rollout = self.settings.rollout
        return RolloutLayers(rollout.kernel, self.lora, rollout.sleep_level, self.settings.aqn.enable)

    def environment(self) -> dict[str, str]:
        """Returns the environment variable for the processes of the run."""
        return {JOB_ENV: json.dumps({"version": __version__, **dataclasses.asdict(self)})}

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Reads the document.

        Raises:
            JobError: the text is not such a document, or another version of QeRL wrote it.
        """
        try:
            content = json.loads(text)
            if (version := content.pop("version")) != __version__:
                raise JobError(
                    f"{JOB_ENV} was written by QeRL {version} in the run's driver, and this "
                    f"process has {__version__}; install one version on every node"
                )
            lora, sharing = content.pop("lora"), content.pop("sharing")
            return cls(
                settings=QeRLSettings.from_mapping(content.pop("settings")),
                lora=lora and LoraSettings(**lora),
                sharing=sharing and BaseSharing(**sharing),
                **content,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = "; ".join(error.problems) if isinstance(error, SettingsError) else repr(error)
            raise JobError(
                f"{JOB_ENV} is not a run's document ({reason}); the driver sets it, so remove it "
                "from the environment and start the run again"
            ) from error


@functools.lru_cache(maxsize=4)
def _read(text: str) -> Job:
    return Job.from_json(text)


def find_job() -> Job | None:
    """Returns the run that this process belongs to, or None without the switch.

    Raises:
        JobError: see :meth:`Job.from_json`.
    """
    text = os.environ.get(JOB_ENV)
    return _read(text) if text else None


def this_job() -> Job:
    """Returns the run that this process belongs to.

    Raises:
        JobError: the process belongs to no run, or see :meth:`Job.from_json`.
    """
    job = find_job()
    if job is None:
        raise JobError(f"{JOB_ENV} is not set: this process does not belong to a run with +qerl=")
    return job
