"""Provides NVFP4 kernels in CUDA C++ for Hopper GPUs: the GEMM, with and without a LoRA adapter,
and block values.

The kernels compute ``y = x (e2m1 * scale)^T / global_scale + bias``, with the LoRA delta of one
adapter if there is one, for any number of tokens. The weight is permuted once (:func:`prepack`,
same size) and then serves decoding, prefill and training:

* :func:`gemm` decodes it on its way to the tensor cores, or, for many tokens, into a temporary
  bfloat16 weight for cuBLAS;
* :func:`lora_gemm` adds ``scaling (x A^T) B^T`` inside the same kernel, for fused projections with
  an A and a B each;
* :func:`block_values` writes the row-major bfloat16 weight without its per-tensor divisor, exactly
  ``e2m1 * scale``; the backward pass needs it, too.

:mod:`.ops` has these functions, :mod:`.support` says what they run on and serve, :mod:`.layout` has
the permutation, :mod:`.build` compiles the CUDA sources, :mod:`.tuning` chooses how a GEMM is
launched, :mod:`.measure` measures that, and :mod:`.launch` passes pointers to the kernels.
"""

from qerl_verl.kernels.hopper.layout import LORA_UNIT, prepack, prepack_lora_b, unpack, unpack_lora_b
from qerl_verl.kernels.hopper.measure import tune
from qerl_verl.kernels.hopper.ops import OPERATORS, block_values, decodes_first, gemm, lora_gemm
from qerl_verl.kernels.hopper.support import unsupported_adapter, unsupported_device, unsupported_weight

__all__ = [
    "LORA_UNIT",
    "OPERATORS",
    "block_values",
    "decodes_first",
    "gemm",
    "lora_gemm",
    "prepack",
    "prepack_lora_b",
    "tune",
    "unpack",
    "unpack_lora_b",
    "unsupported_adapter",
    "unsupported_device",
    "unsupported_weight",
]
