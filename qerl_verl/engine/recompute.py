"""Chooses which layers of a training step keep the outputs of their linears and which recompute
them: selective activation checkpointing (``qerl.recompute``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from qerl_verl.kernels.recompute import KeptOutputs

GIB = 2**30
MARGIN = 0.1
"""The share that stays free: of the memory that a micro-batch needs beside the kept outputs, and of
the memory that would be free after that.
"""


class Recompute:
    """Activation checkpointing that uses free device memory to avoid recomputation.

    With ``auto``, the first micro-batch keeps nothing and shows how much memory it needs. From the
    second on, layer after layer keeps the outputs of its linears while they fit beside that need
    and a margin. The free memory is queried from the device for each micro-batch, so memory that
    another process holds (a rollout engine that does not sleep) is not used. Each rank decides for
    itself.

    Args:
        how: ``auto``, ``full`` (every layer recomputes everything) or ``selective`` (every layer
            keeps the outputs of its linears).
        device: the model's device. ``auto`` is ``full`` on a CPU.
        announce: called with a sentence about what is kept, once it is known.
    """

    def __init__(self, how: str, device: torch.device, announce: Callable[[str], None] = lambda text: None):
        self.how = "full" if how == "auto" and device.type != "cuda" else how
        self._device = device
        self._announce: Callable[[str], None] | None = announce
        # bytes a token, of all that is not kept; an upper bound
        self._need_per_row: float | None = None
        self._start = self._layers = self._kept_layers = self._kept = self._rows = 0
        self._left: float | None = None  # bytes that may still be kept; None until a layer has run
        if self.how != "auto":
            announce(
                f"every layer {'keeps the outputs of its linears' if how == 'selective' else 'recomputes everything'}"
            )

    @property
    def keeps(self) -> bool:
        """Whether the current micro-batch has kept anything."""
        return self.how == "selective" or self._kept > 0

    def begin(self) -> None:
        """Prepares for a micro-batch; called before its forward pass."""
        if self.how != "auto":
            return
        self.observe()
        self._start = torch.cuda.memory_allocated(self._device)
        self._layers = self._kept_layers = self._kept = self._rows = 0
        self._left = None

    def observe(self) -> None:
        """Derives the need of a micro-batch from the peak memory of the process, without the kept
        outputs; called after the backward pass.
        """
        if self.how != "auto" or not self._rows:
            return
        bound = (torch.cuda.max_memory_allocated(self._device) - self._start - self._kept) / self._rows
        first = self._need_per_row is None
        self._need_per_row = bound if first else min(bound, self._need_per_row)
        if not first and self._announce:
            self._announce(
                f"{self._kept_layers} of {self._layers} layers keep the outputs of their linears "
                f"({self._kept / GIB:.1f} GiB for {self._rows} tokens); the others recompute them "
                "in the backward pass"
            )
            self._announce = None
        self._rows = 0

    def context_fn(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Returns the contexts of a layer's first run and of its recomputation, for
        ``torch.utils.checkpoint``.
        """
        outputs = KeptOutputs()
        if self.how == "selective":
            return outputs.recording(), outputs.replaying()
        self._layers += 1
        if self.how == "full" or (self._left is not None and self._left < self._kept / max(self._kept_layers, 1)):
            return nullcontext(), nullcontext()
        return _FirstRun(self, outputs), outputs.replaying()

    def _ran(self, outputs: KeptOutputs) -> None:
        """Decides whether the layer that has just run keeps its outputs."""
        if self._left is None:
            self._rows = outputs.rows
            self._left = self._room(outputs.bytes)
        if outputs.bytes > self._left:
            outputs.drop()
            self._left = -1.0
            return
        self._left -= outputs.bytes
        self._kept += outputs.bytes
        self._kept_layers += 1

    def _room(self, held: int) -> float:
        """Returns how many bytes kept outputs may take in this micro-batch, including the ``held``
        bytes that are kept already.
        """
        if self._need_per_row is None:
            return -1.0
        free, _ = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device) + held
        return (1 - MARGIN) * (free - (1 + MARGIN) * self._need_per_row * self._rows)


class _FirstRun(AbstractContextManager):
    """Records the outputs of a layer's linears, then lets the policy decide whether they are
    kept."""

    def __init__(self, policy: Recompute, outputs: KeptOutputs):
        self.policy, self.outputs, self.recording = policy, outputs, outputs.recording()

    def __enter__(self) -> None:
        self.recording.__enter__()

    def __exit__(self, *exception) -> None:
        self.recording.__exit__(*exception)
        if exception[0] is None:
            self.policy._ran(self.outputs)
