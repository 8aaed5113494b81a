"""Build a transformers model around an NVFP4 checkpoint without ever holding its 16-bit weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from qerl_verl.kernels.backends import KernelCount
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.unused_tensors import is_unused

_PACKED_SUFFIX = ".weight_packed"
_MAPPED_TOGETHER = 32


def checkpoint_files(path: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in the order of its index."""
    path = Path(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [path / name for name in names]
    return [path / "model.safetensors"]


def iterate_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a checkpoint, few tensors in memory at a time: one that is kept keeps its neighbours."""
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
        for begin in range(0, len(names), _MAPPED_TOGETHER):
            # what was read of a mapped file stays in memory until the last tensor of the mapping is gone
            with safe_open(file, framework="pt") as handle:
                for name in names[begin : begin + _MAPPED_TOGETHER]:
                    yield name, handle.get_tensor(name)


def packed_linear_names(path: str | Path) -> set[str]:
    """Full module names of the linears that a checkpoint holds in NVFP4."""
    names: set[str] = set()
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as handle:
            names |= {k.removesuffix(_PACKED_SUFFIX) for k in handle.keys() if k.endswith(_PACKED_SUFFIX)}
    return names


def swap_linears(
    model: nn.Module,
    names: set[str],
    dtype: torch.dtype,
    storage_dtype: torch.dtype = torch.uint8,
) -> None:
    """Replace the named ``nn.Linear`` modules by empty :class:`NVFP4Linear` modules on the same device.

    Args:
        model: built from the checkpoint's configuration, usually on the meta device.
        names: see :func:`packed_linear_names`.
        dtype: of the biases.
        storage_dtype: see :class:`NVFP4Linear`.

    Raises:
        ValueError: a name that is no linear layer of the model.
    """
    modules = dict(model.named_modules())
    for name in sorted(names):
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"the checkpoint holds {name} in NVFP4, but the model has no linear layer of that name")
        parent, _, child = name.rpartition(".")
        try:
            new = NVFP4Linear(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                dtype,
                device=linear.weight.device,
                storage_dtype=storage_dtype,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        setattr(modules[parent], child, new)


def load_tensors(model: nn.Module, path: str | Path, dtype: torch.dtype, new_modules: tuple[str, ...] = ()) -> None:
    """Put a checkpoint's tensors into a model built by :func:`swap_linears`, one at a time.

    Args:
        model: parameters may be on the meta device; they are replaced, not copied into.
        path: the checkpoint folder.
        dtype: of everything that is not packed.
        new_modules: prefixes of modules that the checkpoint does not have (a value head) and that keep what they are.

    Raises:
        ValueError: a shape that does not fit, or tensors that the model lacks or the checkpoint does.
    """
    joined = _parts_of_joined(model)
    expected = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers()), **joined}
    persistent = {n for n in model.state_dict(keep_vars=True) if not n.endswith(".weight_joined")} | set(joined)
    loaded, unexpected = set(), []
    for name, tensor in iterate_tensors(path):
        if is_unused(name):
            continue
        if name not in persistent:
            unexpected.append(name)
            continue
        target = expected[name]
        if name in joined:
            tensor = tensor.view(torch.uint8)
        elif name.endswith(".weight_global_scale"):
            tensor = tensor.to(torch.float32).reshape(1)
        elif tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if tensor.shape != target.shape:
            raise ValueError(
                f"{name} of {path} has shape {tuple(tensor.shape)}, the model expects {tuple(target.shape)}"
            )
        if name in joined:
            _fill(model, name, tensor)
        else:
            _assign(model, name, tensor.clone(), requires_grad=target.requires_grad)
        loaded.add(name)
    model.tie_weights()
    tied = {n for n, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}
    missing = {n for n in persistent - loaded - tied if not n.startswith(new_modules or ("\0",))}
    unexpected = [n for n in unexpected if not (n == "lm_head.weight" and n not in persistent)]
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: missing {sorted(missing)[:5]}, unexpected {unexpected[:5]}"
        )


def prepack_linears(
    model: nn.Module,
    device: torch.device,
    wanted: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    elsewhere: Mapping[str, str] | None = None,
    compute: str = "bf16",
) -> str:
    """Choose the kernels of every :class:`NVFP4Linear` and put the weights into their layout, layer by layer on ``device``.

    Args:
        model: its tensors stay where they are; layers on the meta device get the kernels and no data.
        device: where the model will compute.
        wanted: ``qerl.kernel``.
        dtype: of the activations.
        elsewhere: why a backend, by its name, cannot run on another rank; the ranks share the
            bytes, so all need one layout.
        compute: ``qerl.compute``.

    Returns:
        What was chosen for how many layers of each kind, and why nothing better, for the line
        ``[qerl] kernel:``.

    Raises:
        ValueError: a wanted kernel that cannot run here or does not serve a layer, which it names.
    """
    count, backends = KernelCount(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, NVFP4Linear):
            choice = layer.use_backend(device, wanted, dtype, name=name, elsewhere=elsewhere, compute=compute)
            count.add(name, choice, device)
            backends[layer.out_features, layer.in_features] = layer.backend
    for shape, backend in backends.items():
        if said := backend.tune(device, *shape):
            print(f"[qerl] kernel: {said}", flush=True)
    return str(count)


def _parts_of_joined(model: nn.Module) -> dict[str, torch.Tensor]:
    """The names that a checkpoint has for the two parts of each ``weight_joined``, and views of them."""
    parts = {}
    for name, module in model.named_modules():
        if isinstance(module, NVFP4Linear):
            packed, scale = module.weight_bytes()
            parts |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale}
    return parts


def _fill(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Copy one part into its layer's ``weight_joined``, which the first part brings into being."""
    owner, _, leaf = name.rpartition(".")
    layer = model.get_submodule(owner)
    if layer.weight_bytes()[0].is_meta:
        empty = torch.empty_like(layer.weight_joined, device=tensor.device)
        layer.weight_joined = nn.Parameter(empty, requires_grad=False)
    layer.weight_bytes()[leaf == "weight_scale"].copy_(tensor)


def _assign(model: nn.Module, name: str, tensor: torch.Tensor, requires_grad: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        module._buffers[leaf] = tensor
