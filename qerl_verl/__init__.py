"""QeRL for verl: reinforcement learning with LoRA on a frozen NVFP4 base and adaptive quantization noise.

Add ``+qerl=nvfp4`` to a verl PPO or GRPO command line. See README.md.
"""

__version__ = "0.1.0"
