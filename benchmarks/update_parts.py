"""Divides the GPU time of a training step by what its kernels compute, from PyTorch's profiler.

A kernel is judged by the operator that launched it: its name, the sizes of its inputs (which the
profiler has with ``record_shapes=True``), and the ranges around it. A matrix with a dimension of
the vocabulary's size belongs to the output layer, one with a dimension of the adapter's rank to the
LoRA delta.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

BASE, DECODE, LORA = "GEMMs of the base", "decoding of the weights", "LoRA delta"
ATTENTION, LOSS, OPTIMIZER = "attention", "output layer and loss", "optimizer"
OTHER, UNKNOWN, IDLE = "norms, activation functions, elementwise", "not assigned", "GPU idle"
PARTS = (BASE, DECODE, LORA, ATTENTION, LOSS, OPTIMIZER, OTHER, UNKNOWN, IDLE)
"""The parts, in the order of the table."""

OPTIMIZER_RANGE = "qerl-bench: optimizer"
"""Name of the range (``torch.profiler.record_function``) around the optimizer's step."""
GEMM_OPERATORS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul", "nvfp4_gemm", "nvfp4_lora_gemm")


def part_of(
    operator: str, kernel: str, shapes: Iterable[Any], vocabulary: int, rank: int, ranges: Iterable[str]
) -> str:
    """Returns the part of :data:`PARTS` that a kernel belongs to.

    Args:
        operator: that launched it, as ``aten::mm``.
        kernel: name of the kernel.
        shapes: sizes of the operator's inputs, lists of numbers.
        vocabulary: size of the model's vocabulary.
        rank: of the adapter.
        ranges: names of the operators and ranges around it.
    """
    name, text = operator.rpartition("::")[2], f"{operator} {kernel}".lower()
    sizes = {size for shape in shapes for size in _numbers(shape)}
    if OPTIMIZER_RANGE in ranges:
        return OPTIMIZER
    if any(word in text for word in ("attention", "flash", "fmha")):
        return ATTENTION
    if vocabulary in sizes or "nll_loss" in text:
        return LOSS
    if any(word in text for word in ("dequantize", "block_values", "decompress")):
        return DECODE
    if name in GEMM_OPERATORS:
        return LORA if rank in sizes else BASE
    return OTHER


def _numbers(shape: Any) -> Iterator[int]:
    if isinstance(shape, int):
        yield shape
    elif isinstance(shape, list | tuple):
        for part in shape:
            yield from _numbers(part)


def divide(events: Iterable[Any], wall_ms: float, vocabulary: int, rank: int) -> dict[str, float]:
    """Returns part -> milliseconds; the parts add up to ``wall_ms`` if kernels do not overlap.

    Args:
        events: ``torch.profiler.profile.events()``, of CPU and GPU, with the inputs' shapes.
        wall_ms: time of the profiled section.
        vocabulary: see :func:`part_of`.
        rank: the same.
    """
    parts, busy = dict.fromkeys(PARTS, 0.0), 0.0
    for event in events:
        if event.device_type.name == "CUDA":
            if not event.is_user_annotation:
                busy += event.time_range.elapsed_us() / 1e3
            continue
        if not event.kernels:
            continue
        ranges, around = [], event
        while around is not None:
            ranges.append(around.name)
            around = around.cpu_parent
        for kernel in event.kernels:
            part = part_of(event.name, kernel.name, event.input_shapes or [], vocabulary, rank, ranges)
            parts[part] += kernel.duration / 1e3
    assigned = sum(parts.values())
    parts[UNKNOWN] = max(0.0, busy - assigned)
    parts[IDLE] = max(0.0, wall_ms - max(busy, assigned))
    return parts
