"""Runs operators on the device of their tensors, whichever device is current.

A kernel is launched on the current device's stream. With tensors of another device it would read
memory of the wrong device or fail.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch


def on_tensors_device(operator: Callable) -> Callable:
    """Returns ``operator`` with the device of its tensor arguments as the current one.

    Raises (when called):
        ValueError: the tensors are on several devices.
    """

    @functools.wraps(operator)
    def guarded(*args, **kwargs):
        devices = {a.device for a in _flat((*args, *kwargs.values())) if isinstance(a, torch.Tensor)}
        if len(devices) > 1:
            raise ValueError(f"the tensors have to be on one device, got {', '.join(sorted(map(str, devices)))}")
        device = next(iter(devices))
        if device.type != "cuda":
            return operator(*args, **kwargs)
        with torch.cuda.device(device):
            return operator(*args, **kwargs)

    return guarded


def _flat(args: Iterable) -> Iterable:
    for a in args:
        if isinstance(a, list | tuple):
            yield from _flat(a)
        else:
            yield a
