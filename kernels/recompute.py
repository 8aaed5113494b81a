"""Keeps the outputs of NVFP4 linears from being computed twice under activation checkpointing.

With ``torch.utils.checkpoint`` (non-reentrant) a layer keeps its input alone. Its forward pass runs
again in the backward pass, up to the last tensor that some node saves (early stop). Two things
follow for the linear layers of a frozen base:

* :func:`differentiable` lets the node that saves tensors run before the GEMM. A GEMM that only the
  layer's output needs (``down_proj`` of a decoder layer) is then not computed again.
* :class:`KeptOutputs` hands the outputs of the first run to the second. The GEMMs dominate the
  cost; everything between them (norms, activation function, rotary embedding, attention) runs
  again.

Neither changes a result: the same kernel computes an output from the same input, once instead of
twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

_thread = threading.local()  # the second run takes place in a thread of autograd


class KeptOutputs:
    """Outputs of the NVFP4 linears in one run of a checkpointed layer, in the order of their calls.

    The last one is not kept: the second run ends before it, see :func:`differentiable`.

    Attributes:
        bytes: size of the kept outputs.
        rows: number of tokens of the run.
    """

    def __init__(self) -> None:
        self.bytes, self.rows = 0, 0
        self._kept: list[tuple[torch.Tensor, int] | None] = []
        self._next: int | None = None  # the next call of the second run; None in the first run

    def recording(self) -> AbstractContextManager:
        """Returns a context for the first run of the layer."""
        return _Run(self, None)

    def replaying(self) -> AbstractContextManager:
        """Returns a context for the second run of the layer.

        Further runs find nothing kept and compute everything.
        """
        return _Run(self, 0)

    def drop(self) -> None:
        """Drops all outputs; a second run then computes everything."""
        self._kept, self.bytes = [], 0

    def _forget_the_last(self) -> None:
        if self._kept and (last := self._kept.pop()) is not None:
            self.bytes -= last[0].nbytes

    def _recall(self) -> torch.Tensor | None:
        """Returns the output of the call that has come up, unless this is the first run or the
        layer has changed it in place."""
        if self._next is None:
            return None
        call, self._next = self._next, self._next + 1
        kept = self._kept[call] if call < len(self._kept) else None
        if kept is None:
            return None
        y, version = kept
        self._kept[call] = None  # autograd holds it as long as need be
        self.bytes -= y.nbytes
        return y if y._version == version else None

    def _keep(self, y: torch.Tensor) -> None:
        if self._next is None:
            self._kept.append((y.detach(), y._version))
            self.bytes += y.nbytes
            self.rows = y.numel() // y.shape[-1]


class _Run(AbstractContextManager):
    """Tells the linears of this thread where their outputs are kept; may be entered again."""

    def __init__(self, outputs: KeptOutputs, start: int | None):
        self.outputs, self.start = outputs, start

    def __enter__(self) -> KeptOutputs:
        self.outputs._next = self.start
        self.before, _thread.outputs = getattr(_thread, "outputs", None), self.outputs
        return self.outputs

    def __exit__(self, *exception) -> None:
        _thread.outputs = self.before
        if self.start is None:
            self.outputs._forget_the_last()


class _Attach(torch.autograd.Function):
    """Makes ``y`` the output of the node behind ``placeholder``; saves nothing."""

    @staticmethod
    def forward(ctx, placeholder, y):
        # no view of y: PyTorch forbids to change a view in place that an autograd function returned
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def placeholder(like: torch.Tensor, features: int) -> torch.Tensor:
    """Returns a tensor without memory, ``[..., features]`` for ``like`` ``[..., K]``, that the
    ``node`` of :func:`differentiable` returns."""
    return like.new_empty(()).expand(*like.shape[:-1], features)


def differentiable(
    node: type[torch.autograd.Function], inputs: tuple, compute: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Returns ``compute()`` with the backward pass of ``node``, which saves its tensors before
    anything is computed.

    Args:
        node: its ``forward(ctx, *inputs)`` saves tensors and returns a :func:`placeholder`; its
            ``backward`` takes the output's gradient.
        inputs: the arguments of ``node``.
        compute: returns the output. It is called without autograd, and not at all if the output was
            kept.
    """
    if not torch.is_grad_enabled():
        return compute()
    outputs = getattr(_thread, "outputs", None)
    held = node.apply(*inputs)
    with torch.no_grad():
        y = None if outputs is None else outputs._recall()
        if y is None:
            y = compute()
    y = _Attach.apply(held, y)
    if outputs is not None:
        outputs._keep(y)
    return y
