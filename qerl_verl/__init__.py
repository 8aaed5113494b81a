"""QeRL for verl: reinforcement learning with LoRA on a frozen NVFP4 base and adaptive quantization noise.

Add ``+qerl=nvfp4`` to a verl PPO or GRPO command line. See README.md.
"""

__version__ = "0.1.0"

from pathlib import Path as _Path

_checkout = _Path(__file__).resolve().parent.parent
if (_checkout / "setup.py").exists() and (_checkout / "kernels").is_dir():
    # Python started in a checkout finds this folder before the installed package; `kernels` and `recipes` lie beside it
    __path__.append(str(_checkout))
