"""Times the replacements of flash-attn in a training step: packed attention and log-probabilities.

    python benchmarks/bench_without_flash_attn.py --json benchmarks/results/without_flash_attn_h100.json

Attention is SDPA with a dense mask, as transformers calls it for packed sequences, against
``qerl_verl.kernels.packed_attention``. Log-probabilities are the output layer, float32 logits and
PyTorch's log_softmax, row by row as verl computes them without flash-attn's cross entropy, against
``qerl_verl.kernels.linear_logprobs``. Shapes are those of Qwen2.5-32B. Times are medians in
milliseconds; peaks of memory are in GiB above the inputs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from result_file import ResultFile
from torch.nn.functional import log_softmax, scaled_dot_product_attention

from qerl_verl.kernels.linear_logprobs import linear_logprobs
from qerl_verl.kernels.packed_attention import packed_attention, packing_of

GIB = 2**30


def time_ms(call, repetitions: int = 10) -> tuple[float, float]:
    """Returns the median time of ``call`` in ms, and its peak memory in GiB."""
    call()
    torch.cuda.synchronize()
    before, times = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repetitions):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), (torch.cuda.max_memory_allocated() - before) / GIB


def both_passes(function, inputs):
    """Returns a call of forward and backward pass of ``function``, with gradients of ``inputs``."""

    def call():
        for tensor in inputs:
            tensor.grad = None
        function().sum().backward()

    return call


def attention(sequences: int, length: int, heads: int, groups: int, dim: int) -> dict:
    tokens = sequences * length
    q, k, v = (
        torch.randn(tokens, n, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for n in (heads, groups, groups)
    )
    positions = torch.arange(length, device="cuda").repeat(sequences).unsqueeze(0)
    packing = packing_of(positions)
    number = torch.arange(tokens, device="cuda") // length
    mask = (number[:, None] == number[None, :]) & torch.ones(tokens, tokens, dtype=torch.bool, device="cuda").tril()

    def dense():
        parts = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        return scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)

    def packed():
        return packed_attention(q, k, v, packing)

    difference = (packed() - dense()[0].transpose(0, 1)).norm() / packed().norm()
    result = {"tokens": tokens, "relative_difference": difference.item()}
    for name, function in (("dense_mask", dense), ("packed", packed)):
        with torch.no_grad():
            forward, _ = time_ms(function)
        total, peak = time_ms(both_passes(function, (q, k, v)))
        result[name] = {"forward_ms": forward, "forward_backward_ms": total, "peak_gib": peak}
    return result


def logprobs(tokens: int, hidden_size: int, vocabulary: int) -> dict:
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, device="cuda", dtype=torch.bfloat16) * hidden_size**-0.5
    labels = torch.randint(0, vocabulary, (tokens,), device="cuda")

    def row_by_row():
        logits = hidden @ weight.t()
        rows = zip(logits, labels)
        return torch.stack(
            [log_softmax(row, dim=-1).gather(-1, label.unsqueeze(-1)).squeeze(-1) for row, label in rows]
        )

    def chunks():
        return linear_logprobs(hidden, weight, labels)[0]

    result = {"tokens": tokens, "largest_difference": (row_by_row() - chunks()).abs().max().item()}
    for name, function, repetitions in (("row_by_row", row_by_row, 2), ("chunks", chunks, 5)):
        with torch.no_grad():
            forward, _ = time_ms(function, repetitions)
        total, peak = time_ms(both_passes(function, (hidden,)), repetitions)
        result[name] = {"forward_ms": forward, "forward_backward_ms": total, "peak_gib": peak}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "command": "python " + " ".join(["benchmarks/bench_without_flash_attn.py", *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }
    parts = {
        "attention": lambda: attention(10, 768, 40, 8, 128),
        "logprobs": lambda: logprobs(7680, 5120, 152064),
    }
    with ResultFile(args.json, result) as file:
        for part in file.steps(parts):
            file.content[part] = parts[part]()
            for name, row in file.content[part].items():
                print(part, name, row if not isinstance(row, dict) else {k: round(v, 3) for k, v in row.items()})


if __name__ == "__main__":
    main()
