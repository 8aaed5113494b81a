"""Measures the launch configurations of the Hopper kernels for a weight shape, see
:mod:`qerl_verl.kernels.autotune`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qerl_verl.kernels import autotune
from qerl_verl.kernels.hopper import tuning
from qerl_verl.kernels.hopper.build import library_path
from qerl_verl.kernels.hopper.launch import run_plan
from qerl_verl.kernels.hopper.layout import UNIT, prepack_lora_b
from qerl_verl.kernels.hopper.support import prepare
from qerl_verl.kernels.hopper.tuning import DECODE_FIRST, DECODE_FIRST_ABOVE, Plan, Shrink, Tuned
from qerl_verl.kernels.packed_weight import PackedWeight

LIMITS = (8, 16, 32, 64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 6144)
"""Numbers of tokens that are measured; each choice serves the numbers between the limit before
and this one."""

LIMITS_WITH_ADAPTER = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The same for the rollout, which runs an adapter inside the GEMM: decoding batches and chunks
of prefill."""

DECODE_FIRST_CANDIDATE_ABOVE = 128
"""Up to this many tokens a temporary 16-bit weight is not a candidate: it costs more traffic
than it saves."""

SHRINKS = tuple(Shrink(shape, cluster) for shape in (0, 1) for cluster in (8, 4, 2))


def version() -> str:
    """Returns a hash that changes with the kernels, the limits and the candidates."""
    return autotune.content_version(library_path().name, tuning.CONFIGS, LIMITS, LIMITS_WITH_ADAPTER, SHRINKS)


def tune(device: torch.device, n: int, k: int, ends: Sequence[int] | None = None, rank: int = 32) -> str | None:
    """Measures the launch configurations of an ``[n, k]`` weight, unless the cache has them, and
    installs the fastest.

    Args:
        device: a Hopper GPU.
        n: rows of the weight, a multiple of 64.
        k: columns, a multiple of 64.
        ends: with an adapter inside the GEMM, the row at which each fused projection ends; None
            without one.
        rank: rank of the adapter, padded like its buffers; a multiple of 16.

    Returns:
        A sentence that says what was measured, or why the built-in table stays in use; None if
        neither.
    """
    if not autotune.enabled():
        return None
    with torch.cuda.device(device):
        prepare(torch.cuda.current_device())
        return _tune(n, k, ends, rank)


def _tune(n: int, k: int, ends: Sequence[int] | None, rank: int) -> str | None:
    align = tuning.alignment(ends)
    if tuning.installed(n, k, align):
        return None
    device = torch.cuda.current_device()
    name = f"{n}x{k}" + ("" if ends is None else "-lora" + "-".join(map(str, ends)) + f"-r{rank}")
    choices, said = autotune.choices("hopper", device, version(), name, lambda: _measure(device, n, k, ends, rank))
    if choices is not None:
        tuning.install(n, k, align, [Tuned(*choice) for choice in choices])
    return said


@torch.no_grad()
def _measure(device: int, n: int, k: int, ends: Sequence[int] | None, rank: int) -> list[Tuned]:
    with torch.cuda.device(device):
        choices = [_best(problem, limit) for problem in [_Problem(n, k, ends, rank)] for limit in problem.limits]
        torch.cuda.empty_cache()
        return choices


class _Problem:
    """Random weights of one shape, in as many copies as a measurement rotates through."""

    def __init__(self, n: int, k: int, ends: Sequence[int] | None, rank: int):
        self.n, self.k, self.align = n, k, tuning.alignment(ends)
        self.sms = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        self.limits = LIMITS if ends is None else LIMITS_WITH_ADAPTER
        generator = torch.Generator("cuda").manual_seed(0)
        size, options = n * k, {"device": "cuda", "generator": generator}
        self.copies = autotune.copies_of(size * 9 // 16)
        self.weights = [
            PackedWeight(
                torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, **options),
                torch.randint(0x50, 0x70, (n, k // 16), dtype=torch.uint8, **options),
                1.0,
            )
            for _ in range(self.copies)
        ]
        self.lora = None
        if ends is not None:
            a = torch.randn(len(ends) * rank, k, dtype=torch.bfloat16, **options) / k**0.5
            b = prepack_lora_b(torch.randn(n, rank, dtype=torch.bfloat16, **options) * 0.1)
            self.lora = (a, b, tuple(ends), 1.0)
        autotune.warm_up()

    def call(self, x: torch.Tensor, plan: Plan, how: Shrink | None):
        """Returns one launch as a model makes it: with an adapter, another kernel writes ``x``
        just before."""

        def run(copy: int) -> None:
            if self.lora is not None:
                x.mul_(1.0)
            run_plan(x, self.weights[copy], None, plan, lora=self.lora, how=how)

        return run


def _best(problem: _Problem, limit: int) -> Tuned:
    """Returns the fastest launch for ``limit`` tokens; with an adapter, first the GEMM's, then
    that of x A^T before it."""
    x = torch.randn(limit, problem.k, device="cuda", dtype=torch.bfloat16)
    plans = list(tuning.candidates(limit, problem.n, problem.k, problem.sms, problem.align))
    if limit > DECODE_FIRST_CANDIDATE_ABOVE:
        plans.append(DECODE_FIRST)
    table = tuning.choose(limit, problem.n, problem.k, problem.sms, problem.align)
    if table not in plans:
        plans.append(table)
    rows = 0 if problem.lora is None else problem.lora[0].shape[0]
    how = tuning.choose_shrink(limit, problem.n, problem.k, rows, problem.sms, problem.align) if rows else None
    plan, _ = autotune.fastest({p: problem.call(x, p, how) for p in plans}, problem.copies)
    if rows and plan.config >= 0 and limit <= tuning.SHRINK_LIMIT:
        shrinks = dict.fromkeys((how, *SHRINKS))
        how, _ = autotune.fastest({s: problem.call(x, plan, s) for s in shrinks}, problem.copies)
    return Tuned(limit, plan.config, plan.blocks, plan.cluster, *(how or Shrink(0, 4)))


assert DECODE_FIRST_ABOVE == LIMITS[-1], "without an adapter, more tokens are decoded first without a choice"
assert UNIT == 64, "the borders of tuning.alignment are counted in units of 64 rows"
