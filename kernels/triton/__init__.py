"""Provides NVFP4 kernels in Triton, for every NVIDIA GPU from Ampere on: block values, GEMM and
experts.

The weights are in the layout of the checkpoint (compressed-tensors ``nvfp4-pack-quantized``), so
that nothing has to be repacked: ``packed`` ``[N, K / 2]`` uint8 holds two E2M1 codes a byte, the
even input channel in the low nibble; ``scale`` ``[N, K / 16]`` holds E4M3; one divisor for the
tensor is its ``weight_global_scale``.

:mod:`.ops` has the functions to call, :mod:`.support` says what they run on and serve, and
:mod:`.tuning` chooses how a GEMM is launched. The other modules hold one kernel each.

Importing this package needs PyTorch alone. Without Triton or a GPU, :func:`unsupported_device` says
so and every function raises a RuntimeError. If TRITON_INTERPRET=1 is set before Triton is imported,
the functions run on a CPU in Triton's interpreter, slowly, for tests.
"""

from qerl_verl.kernels.triton.ops import OPERATORS, block_values, experts, gemm, warm_up_experts
from qerl_verl.kernels.triton.support import (
    padded_expert_rank,
    unsupported_adapter,
    unsupported_device,
    unsupported_experts,
    unsupported_weight,
)
from qerl_verl.kernels.triton.tuning import Plan, choose, tune

__all__ = [
    "OPERATORS",
    "Plan",
    "block_values",
    "choose",
    "experts",
    "gemm",
    "padded_expert_rank",
    "tune",
    "unsupported_adapter",
    "unsupported_device",
    "unsupported_experts",
    "unsupported_weight",
    "warm_up_experts",
]
