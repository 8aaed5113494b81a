"""Which layers of a training step keep the products of their linears, and which compute them
again (``qerl.recompute``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from qerl_verl.kernels.recompute import KeptOutputs

GIB = 2**30
MARGIN = 0.1
"""Of what a micro-batch needs beside what is kept, and of what would be free after that."""


class Recompute:
    """Activation checkpointing that spends free device memory on computing less twice.

    With ``auto`` the first micro-batch keeps nothing and shows what it needs. From the second on,
    layer after layer keeps its products while they fit beside that need and a margin. What is free
    is asked of the device for each micro-batch, so memory that another process holds (a rollout
    engine that does not sleep) is left to it. Each rank decides for itself.

    Args:
        how: ``auto``, ``full`` (every layer computes everything again) or ``selective`` (every
            layer keeps its products).
        device: where the model is. ``auto`` is ``full`` on a CPU.
        announce: takes a sentence about what is kept, once it is known.
    """

    def __init__(self, how: str, device: torch.device, announce: Callable[[str], None] = lambda text: None):
        self.how = "full" if how == "auto" and device.type != "cuda" else how
        self._device = device
        self._announce: Callable[[str], None] | None = announce
        self._need_per_row: float | None = None  # bytes a token, of all that is not kept; an upper bound
        self._start = self._layers = self._kept_layers = self._kept = self._rows = 0
        self._left: float | None = None  # bytes that may still be kept; None until a layer has run
        if self.how != "auto":
            announce(f"every layer {'keeps its products' if how == 'selective' else 'computes its products again'}")

    @property
    def keeps(self) -> bool:
        """Whether the micro-batch at hand has kept anything."""
        return self.how == "selective" or self._kept > 0

    def begin(self) -> None:
        """Before the forward pass of a micro-batch."""
        if self.how != "auto":
            return
        self.observe()
        self._start = torch.cuda.memory_allocated(self._device)
        self._layers = self._kept_layers = self._kept = self._rows = 0
        self._left = None

    def observe(self) -> None:
        """After the backward pass of a micro-batch: it needed no more than the process ever had,
        without what it kept."""
        if self.how != "auto" or not self._rows:
            return
        bound = (torch.cuda.max_memory_allocated(self._device) - self._start - self._kept) / self._rows
        first = self._need_per_row is None
        self._need_per_row = bound if first else min(bound, self._need_per_row)
        if not first and self._announce:
            self._announce(
                f"{self._kept_layers} of {self._layers} layers keep their products ({self._kept / GIB:.1f} GiB for "
                f"{self._rows} tokens); the others compute them again in the backward pass"
            )
            self._announce = None
        self._rows = 0

    def context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For ``torch.utils.checkpoint``: the contexts of a layer's first run and of its second."""
        products = KeptOutputs()
        if self.how == "selective":
            return products.recording(), products.replaying()
        self._layers += 1
        if self.how == "full" or (self._left is not None and self._left < self._kept / max(self._kept_layers, 1)):
            return nullcontext(), nullcontext()
        return _FirstRun(self, products), products.replaying()

    def _ran(self, products: KeptOutputs) -> None:
        """A layer has run and holds its products."""
        if self._left is None:
            self._rows = products.rows
            self._left = self._room(products.bytes)
        if products.bytes > self._left:
            products.drop()
            self._left = -1.0
            return
        self._left -= products.bytes
        self._kept += products.bytes
        self._kept_layers += 1

    def _room(self, held: int) -> float:
        """Returns the bytes that products may take in this micro-batch, ``held`` of them
        already."""
        if self._need_per_row is None:
            return -1.0
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device) + held
        return (1 - MARGIN) * (free - (1 + MARGIN) * self._need_per_row * self._rows)


class _FirstRun(AbstractContextManager):
    """Records a layer's products, then lets the policy decide whether they stay."""

    def __init__(self, policy: Recompute, products: KeptOutputs):
        self.policy, self.products, self.recording = policy, products, products.recording()

    def __enter__(self) -> None:
        self.recording.__enter__()

    def __exit__(self, *exception) -> None:
        self.recording.__exit__(*exception)
        if exception[0] is None:
            self.policy._ran(self.products)
