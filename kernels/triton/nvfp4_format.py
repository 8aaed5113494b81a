"""Decodes E2M1 and E4M3 by their bits, for Triton kernels on any GPU.

Decoding uses no table and no 8-bit floating-point type, which GPUs before Hopper and Triton's
interpreter lack. It moves the bits to the places of float16's sign, exponent and mantissa. float16
has another exponent bias, so the result is off by a power of two, also for subnormal numbers, which
float16 has as well. The powers of two are multiplied back in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

E2M1_FACTOR = tl.constexpr(16384.0)
"""The factor that the two functions for E2M1 leave out: 2**(15 - 1), from the biases of float16 and
E2M1."""


@triton.jit
def e4m3_to_float32(byte):
    """Returns the value of E4M3 bytes (uint8) in float32. Exact for every finite one; the two
    NaN bytes come out as +-480."""
    bits = byte.to(tl.uint16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0  # 2**(15 - 7)


@triton.jit
def e2m1_low_to_float32(byte):
    """Returns the low nibbles of bytes (uint8) as E2M1 values in float32, divided by
    E2M1_FACTOR."""
    bits = byte.to(tl.uint16)
    half = ((bits << 12) & 0x8000) | ((bits << 9) & 0x0E00)
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def e2m1_high_to_float32(byte):
    """Returns the high nibbles of bytes (uint8) as E2M1 values in float32, divided by
    E2M1_FACTOR."""
    bits = byte.to(tl.uint16)
    half = ((bits << 8) & 0x8000) | ((bits << 5) & 0x0E00)
    return half.to(tl.float16, bitcast=True).to(tl.float32)


INTERPRETED = not isinstance(e4m3_to_float32, triton.runtime.JITFunction)
"""Whether these kernels run in Triton's interpreter: TRITON_INTERPRET=1 when Triton was
imported."""
