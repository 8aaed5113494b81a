"""Measures the launch configurations of the Triton kernels for a weight shape, see
:mod:`qerl_verl.kernels.autotune`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import triton
from triton.errors import TritonError

from qerl_verl.kernels import autotune
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.kernels.triton import tuning
from qerl_verl.kernels.triton.nvfp4_gemm import run_plan
from qerl_verl.kernels.triton.tuning import Plan, Tuned

SOURCES = ("nvfp4_gemm.py", "nvfp4_block_values.py", "nvfp4_format.py", "tuning.py")
"""Files of this folder that decide what is measured."""


@functools.cache
def version() -> str:
    """Returns a hash that changes with the kernels, the candidates, Triton and PyTorch."""
    folder = Path(__file__).parent
    sources = [(folder / name).read_bytes() for name in SOURCES]
    return autotune.content_version(*sources, triton.__version__, torch.__version__)


def tune(n: int, k: int) -> str | None:
    """Chooses the launches of one weight shape on the current device, by measuring or from the
    cache.

    Args:
        n: rows of the weight.
        k: columns, a multiple of 64.

    Returns:
        A sentence where something was measured, or could not be for lack of memory; else None.
    """
    if tuning.installed(n, k):
        return None
    device = torch.cuda.current_device()
    choices, said = autotune.choices("triton", device, version(), f"{n}x{k}", lambda: _measure(device, n, k))
    if choices is not None:
        tuning.install(n, k, [Tuned(limit, Plan(*plan)) for limit, plan in choices])
    return said


@torch.no_grad()
def _measure(device: int, n: int, k: int) -> list[Tuned]:
    with torch.cuda.device(device):
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        generator = torch.Generator("cuda").manual_seed(0)
        options = {"dtype": torch.uint8, "device": "cuda", "generator": generator}
        copies = autotune.copies_of(n * k * 9 // 16)
        weights = [
            PackedWeight(
                torch.randint(0, 256, (n, k // 2), **options), torch.randint(0x50, 0x70, (n, k // 16), **options), 1.0
            )
            for _ in range(copies)
        ]
        autotune.warm_up()
        choices = []
        for limit in tuning.LIMITS:
            x = torch.randn(limit, k, device="cuda", dtype=torch.bfloat16)
            plans = tuning.candidates(limit, n, k, sms)
            choices.append(Tuned(limit, best(plans, functools.partial(_call, x, weights), copies)))
        torch.cuda.empty_cache()
        return choices


def best(plans: Iterable[Plan], call_of: Callable[[Plan], Callable[[int], None]], copies: int, time_call=None) -> Plan:
    """Returns the fastest of ``plans``; of equal ones the first.

    Args:
        call_of: of a plan, a call that takes the number of a weight copy.
        copies: of the weight.
        time_call: see :func:`qerl_verl.kernels.autotune.fastest`.
    """
    return autotune.fastest({plan: _without_triton_errors(call_of(plan)) for plan in plans}, copies, time_call)[0]


def _call(x: torch.Tensor, weights: list[PackedWeight], plan: Plan) -> Callable[[int], None]:
    def run(copy: int) -> None:
        run_plan(x, weights[copy], None, None, None, plan)

    return run


def _without_triton_errors(call: Callable[[int], None]) -> Callable[[int], None]:
    """Returns ``call`` with a RuntimeError in the place of Triton's, which say that a tile does
    not fit this GPU."""

    def run(copy: int) -> None:
        try:
            call(copy)
        except TritonError as error:
            raise RuntimeError(str(error)) from error

    return run
