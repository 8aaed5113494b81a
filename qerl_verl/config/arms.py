"""Defines the arms of the comparison: the forms in which actor and rollout store the frozen base.

Everything else is the same in every arm: trainer, noise, adapters and where they start from, data
order and seeds.

| arm | base | actor | rollout | |---|---|---|---| | nvfp4 | NVFP4, quantized once into the cache |
QeRL's engine and kernels | QeRL's or vLLM's kernels | | mxfp4 | MXFP4, in the container of NVFP4 |
as nvfp4 | as nvfp4 | | bf16 | the 16-bit checkpoint | verl's FSDP2 engine | vLLM with its own LoRA
path | | nf4 | NF4, quantized by bitsandbytes at each load | verl's FSDP2 engine on bitsandbytes'
linears | vLLM's bitsandbytes |

The module can be imported without torch, verl or vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from qerl_verl.config.keys import get_value


@dataclass(frozen=True)
class Arm:
    """One way to store the frozen base.

    Attributes:
        name: as in ``+qerl=``.
        base: the form of the base, for messages.
        container: whether the base is a checkpoint in NVFP4's format, run by QeRL's engine and
            kernels.
        load_format: vLLM's ``load_format`` for the base.
        critic: whether the arm trains a critic.
    """

    name: str
    base: str
    container: bool
    load_format: str = "safetensors"
    critic: bool = False


ARMS = {
    arm.name: arm
    for arm in (
        Arm("nvfp4", "NVFP4", container=True, critic=True),
        Arm("mxfp4", "MXFP4", container=True, critic=True),
        Arm("bf16", "16 bits", container=False),
        Arm("nf4", "NF4", container=False, load_format="bitsandbytes"),
    )
}


def get_arm(config: DictConfig) -> Arm:
    """Returns the arm of a composed configuration whose settings have been checked; nvfp4 if the
    ``qerl`` node names none.
    """
    return ARMS[get_value(config, "qerl.arm") or "nvfp4"]
