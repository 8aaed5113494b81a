"""Tells which arithmetic this machine's CPU has. The module can be imported without torch, verl or
vLLM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of Linux's /proc/cpuinfo for bfloat16 dot products: two of x86-64, one of Arm."""

ISAS_WITHOUT_BFLOAT16 = frozenset(
    {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
)
"""Values of oneDNN's ``ONEDNN_MAX_CPU_ISA`` below the first instruction set with bfloat16 dot
products."""


def missing_bfloat16(environment: Mapping[str, str] = os.environ, cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """Returns why bfloat16 is slower than float32 on this CPU, or None if the CPU multiplies
    bfloat16 in hardware.

    Without such instructions PyTorch's bfloat16 GEMM converts to float32 and back. With AVX-512 it
    then takes 2.4 times as long as the float32 GEMM, with AVX2 4 to 5 times.

    Args:
        environment: environment variables of the run; ``ONEDNN_MAX_CPU_ISA`` limits what PyTorch
            uses.
        cpuinfo: the file that lists the CPU's flags. If it cannot be read, the CPU is assumed to
            support bfloat16.
    """
    limit = environment.get("ONEDNN_MAX_CPU_ISA", environment.get("DNNL_MAX_CPU_ISA", "")).upper()
    if limit in ISAS_WITHOUT_BFLOAT16:
        return f"ONEDNN_MAX_CPU_ISA={limit} keeps PyTorch from bfloat16 instructions"
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), None)
    if flags is None or BFLOAT16_FLAGS & set(flags):
        return None
    return "this CPU has no bfloat16 instructions"
