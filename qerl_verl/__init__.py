"""QeRL for verl: reinforcement learning with LoRA on a frozen NVFP4 base and quantization noise.

Add ``+qerl=nvfp4`` to a verl PPO or GRPO command line. See README.md.
"""

__version__ = "0.1.0"

import logging as _logging
import os as _os

# The logger has a level of its own, because verl's vllm_async_server imports a module that sets the
# root logger to ERROR, which would drop every warning.
_logging.getLogger(__name__).setLevel(_os.getenv("VERL_LOGGING_LEVEL", "WARNING"))
