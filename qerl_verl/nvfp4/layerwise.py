"""Applies GPTQ to a checkpoint layer by layer, and compares two checkpoints in the same way.

A layer's Hessians come from activations that have passed through the quantized layers before it.
Each finished layer is a file in a folder of its own, so that the next attempt after a kill
continues there. It recomputes the activations by running the finished layers.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_quantize import pack_e2m1
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.calibration import Calibration
from qerl_verl.nvfp4.decoder import Activations, LayerwiseDecoder, SeparateExperts
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.gptq import Hessian, gptq_codes
from qerl_verl.nvfp4.quantizers import (
    PackedLinear,
    SquaredError,
    round_weight,
    shared_global_scale,
    squared_error,
    tensors_of,
)
from qerl_verl.nvfp4.safetensors_stream import TensorInfo, read_tensor

_PARTS = ("weight_packed", "weight_scale", "weight_global_scale")


class FinishedLayers:
    """The decoder layers that an attempt has quantized, one safetensors file each in a folder.

    Args:
        dst: the checkpoint. The folder lies beside it and appears with the first layer.
        key: hash of what the layers depend on; another attempt with the same key reuses them.
    """

    def __init__(self, dst: Path, key: str):
        self.folder = dst.with_name(f"{dst.name}.layers-{key}")
        self._last: tuple[int, dict[str, PackedLinear]] = (-1, {})
        self.errors: dict[str, SquaredError] = {}
        """Full name -> error of the linears that were written or read through this object."""

    @property
    def nbytes(self) -> int:
        """Size in bytes of the finished layers."""
        return sum(file.stat().st_size for file in self.folder.glob("layer-*.safetensors"))

    @property
    def kept(self) -> str:
        """Clause for a message: where the finished layers are, and that they are reused."""
        return f"; the layers that were finished are kept in {self.folder}, and the same command continues from them"

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:05d}.safetensors"

    def __contains__(self, index: int) -> bool:
        return self._file(index).exists()

    def write(self, index: int, linears: dict[str, PackedLinear]) -> None:
        """Adds a layer. Its file appears complete, by a rename.

        Raises:
            OSError: the disk is full (ENOSPC), or the write failed for another reason.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        errors = {name: linear.error for name, linear in linears.items()}
        metadata = {"errors": json.dumps({name: asdict(error) for name, error in errors.items()})}
        try:
            save_file(tensors_of(linears), temporary, metadata=metadata)
            temporary.replace(self._file(index))
        except SafetensorError as error:  # safetensors raises it for a full disk
            raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.errors |= errors

    def read(self, index: int) -> dict[str, PackedLinear]:
        """Reads a finished layer.

        Raises:
            CheckpointError: another process has removed it.
        """
        try:
            with safe_open(self._file(index), framework="pt") as file:
                errors = {n: SquaredError(**e) for n, e in json.loads(file.metadata()["errors"]).items()}
                self.errors |= errors
                return {
                    name: PackedLinear(
                        packed=file.get_tensor(f"{name}.weight_packed"),
                        scale=file.get_tensor(f"{name}.weight_scale"),
                        global_scale=file.get_tensor(f"{name}.weight_global_scale"),
                        error=error,
                    )
                    for name, error in errors.items()
                }
        except FileNotFoundError as error:
            raise CheckpointError(f"{self._file(index)}: another process has removed this finished layer.") from error

    def linear(self, name: str) -> PackedLinear:
        """Returns a linear by its full name, ``<prefix><layer>.<linear>``.

        The layer that was read last stays in memory.
        """
        index = int(next(part for part in name.split(".") if part.isdigit()))
        if self._last[0] != index:
            self._last = (index, self.read(index))
        return self._last[1][name]

    def remove(self) -> None:
        """Removes the layers, and their folder if it is empty then.

        Called when the checkpoint is in place.
        """
        for file in self.folder.glob("*"):
            if re.fullmatch(r"layer-\d{5}\.safetensors|[0-9a-f]{32}\.tmp", file.name):
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


@torch.no_grad()
def gptq_layers(
    config: Any,
    tensors: dict[str, TensorInfo],
    calibration: Calibration,
    finished: FinishedLayers,
    device: torch.device,
    progress: bool = True,
) -> FinishedLayers:
    """Quantizes the linears of every decoder layer by GPTQ.

    The device holds the weights of one layer, its Hessians and the activations between two layers.

    Args:
        config: transformers' configuration of the model.
        tensors: the tensors of the checkpoint in 16 or 32 bits.
        calibration: the calibration text.
        finished: receives the layers; those that it already holds are not computed again.
        device: where to compute.
        progress: show a progress bar on stderr.

    Returns:
        ``finished``, with all layers.

    Raises:
        CheckpointError: an activation is NaN or Inf; or see :meth:`FinishedLayers.read`.
    """
    architecture = get_architecture(config)
    decoder = LayerwiseDecoder(config, tensors, device)
    stream = decoder.embed(calibration.sequences)
    bar = _bar(range(len(decoder)), f"Quantizing to NVFP4 (GPTQ, {calibration.tokens:,} tokens)", progress)
    for index in bar:
        last = index + 1 == len(decoder)
        if index in finished and last:
            finished.read(index)
            break
        layer = decoder.load_layer(index)
        if index in finished:
            linears = finished.read(index)
        else:
            prefix = f"{architecture.layer_prefix}{index}."
            linears = {}
            groups = architecture.layer_groups(config, index)
            hessians = _hessians(layer, index, stream, [group[0] for group in groups])
            for group in groups:
                weights = {name: read_tensor(tensors[f"{prefix}{name}.weight"]).to(device) for name in group}
                try:
                    packed = _gptq_group(weights, hessians.pop(group[0]).sum)
                except ValueError as error:
                    raise CheckpointError(f"{prefix}{group[0]}: {error}, so GPTQ cannot be computed here.") from error
                linears |= {f"{prefix}{name}": linear for name, linear in packed.items()}
            finished.write(index, linears)
        if not last:
            _put_into(layer, f"{architecture.layer_prefix}{index}.", linears)
            for activations in stream:
                activations.advance(layer, index)
        decoder.drop_layer(index)
    return finished


def _gptq_group(weights: dict[str, torch.Tensor], hessian: torch.Tensor) -> dict[str, PackedLinear]:
    """Quantizes linears with the same input and one global scale, solving them together.

    Args:
        weights: name -> ``[N, K]``.
        hessian: ``[K, K]`` float32.
    """
    global_scale = shared_global_scale((w.abs().max().float() for w in weights.values()), "gptq")
    rounded = [round_weight(w, global_scale, "four-over-six") for w in weights.values()]
    scale = torch.cat([r.scale.view(torch.uint8) for r in rounded]).view(torch.float8_e4m3fn).to(hessian.device)
    weight = torch.cat(list(weights.values()))
    packed = pack_e2m1(gptq_codes(weight, hessian, scale.float() / global_scale.to(hessian.device)))
    linears, begin = {}, 0
    for name, w in weights.items():
        rows = slice(begin, begin + len(w))
        begin += len(w)
        p, s = packed[rows], scale.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        weight_error, square = squared_error(w, p, s, global_scale)
        difference = dequantize_nvfp4(p, s, global_scale.to(w.device), torch.float32).sub_(w)
        output_error, output = (((d @ hessian) * d).sum(dtype=torch.float64).item() for d in (difference, w.float()))
        error = SquaredError(weight_error.item(), square.item(), output_error, output)
        # cloned, because safetensors refuses tensors that share memory
        linears[name] = PackedLinear(p.clone().cpu(), s.clone().cpu(), global_scale.clone().cpu(), error)
    return linears


def _hessians(layer: nn.Module, index: int, stream: Sequence[Activations], names: Sequence[str]) -> dict[str, Hessian]:
    """Returns the Hessians of the inputs of the named linears, without padding.

    The activations are not changed. The Hessian of an expert covers the tokens that the router
    sends to it. An expert without tokens has a Hessian of zeros, with which GPTQ rounds to nearest.
    """
    hessians = {}
    inside = torch.empty(0, dtype=torch.bool)  # of the batch that runs
    experts = [module for module in layer.modules() if isinstance(module, SeparateExperts)]

    def collect(hessian: Hessian, owner: SeparateExperts | None, module: nn.Module, arguments: tuple) -> None:
        hessian.add(arguments[0][inside if owner is None else inside.flatten()[owner.chosen]])

    with contextlib.ExitStack() as hooks:
        for name in names:
            linear = layer.get_submodule(name)
            owner = next((e for e in experts if any(linear is module for module in e.modules())), None)
            hessians[name] = Hessian.empty(linear.in_features, linear.weight.device)
            hooks.callback(linear.register_forward_pre_hook(partial(collect, hessians[name], owner)).remove)
        for activations in stream:
            inside = activations.inside
            activations.copy().advance(layer, index)
    return hessians


@torch.no_grad()
def compare_checkpoints(
    config: Any,
    original: dict[str, TensorInfo],
    packed: dict[str, TensorInfo],
    sequences: Sequence[tuple[Sequence[int], int]],
    device: torch.device,
    progress: bool = True,
) -> dict[str, float]:
    """Measures the loss on a text before and after quantization, and the KL divergence between
    both.

    Args:
        config: transformers' configuration of the model.
        original: tensors of the 16- or 32-bit checkpoint.
        packed: tensors of the NVFP4 one.
        sequences: as for :meth:`~qerl_verl.nvfp4.decoder.LayerwiseDecoder.embed`.
        device: where to compute.
        progress: show a progress bar on stderr.

    Returns:
        See :meth:`~qerl_verl.nvfp4.decoder.LayerwiseDecoder.compare`.
    """
    architecture = get_architecture(config)
    decoder = LayerwiseDecoder(config, original, device)
    reference = decoder.embed(sequences)
    ours = [activations.copy() for activations in reference]
    for index in _bar(range(len(decoder)), "Measuring the loss", progress):
        layer, prefix = decoder.load_layer(index), f"{architecture.layer_prefix}{index}."
        for activations in reference:
            activations.advance(layer, index)
        linears = [linear for group in architecture.layer_groups(config, index) for linear in group]
        load_packed_weights(layer, prefix, linears, packed)
        for activations in ours:
            activations.advance(layer, index)
        decoder.drop_layer(index)
    return decoder.compare(ours, reference)


def load_packed_weights(layer: nn.Module, prefix: str, linears: Sequence[str], tensors: dict[str, TensorInfo]) -> None:
    """Loads the decoded weights of an NVFP4 checkpoint into the linears of a decoder layer.

    Args:
        layer: on a device, in the dtype in which it computes.
        prefix: what its names in the checkpoint begin with, ``model.layers.<index>.``
        linears: names within the layer.
        tensors: the tensors of the checkpoint.
    """
    for name in linears:
        module = layer.get_submodule(name)
        parts = (read_tensor(tensors[f"{prefix}{name}.{part}"]).to(module.weight.device) for part in _PARTS)
        packed, scale, global_scale = parts
        _set_weight(module, dequantize_nvfp4(packed, scale, global_scale, module.weight.dtype))


def _put_into(layer: nn.Module, prefix: str, linears: dict[str, PackedLinear]) -> None:
    for name, linear in linears.items():
        module = layer.get_submodule(name.removeprefix(prefix))
        parts = (t.to(module.weight.device) for t in (linear.packed, linear.scale, linear.global_scale))
        packed, scale, global_scale = parts
        _set_weight(module, dequantize_nvfp4(packed, scale, global_scale, module.weight.dtype))


def _set_weight(module: nn.Module, weight: torch.Tensor) -> None:
    module.weight = nn.Parameter(weight, requires_grad=False)


def _bar(items: range, title: str, progress: bool) -> Iterator[int]:
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(items, desc=title, unit="layer", disable=not progress, mininterval=interval)
