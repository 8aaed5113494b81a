"""Builds a transformers model from an NVFP4 checkpoint without holding its 16-bit weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from qerl_verl.kernels.backends import KernelCount
from qerl_verl.log_lines import say
from qerl_verl.nvfp4.architectures import UnsupportedArchitecture, get_architecture
from qerl_verl.nvfp4.experts import PROJECTIONS, STACKS, NVFP4Experts, is_experts
from qerl_verl.nvfp4.linear import NVFP4Linear
from qerl_verl.nvfp4.unused_tensors import is_unused

_PACKED_SUFFIX = ".weight_packed"
_MAPPED_TOGETHER = 32


def checkpoint_files(path: str | Path) -> list[Path]:
    """Returns the safetensors files of a checkpoint folder, in the order of its index."""
    path = Path(path)
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [path / name for name in names]
    return [path / "model.safetensors"]


def _module_name(path: str | Path) -> Callable[[str], str]:
    """Returns a function from a name in a checkpoint's files to the name in transformers' model."""
    config = Path(path) / "config.json"
    try:
        return get_architecture(json.loads(config.read_text(encoding="utf-8"))).module_name
    except (FileNotFoundError, UnsupportedArchitecture):
        return lambda name: name


def iterate_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name in transformers' model and tensor for everything in a checkpoint.

    Few tensors are in memory at a time. A tensor that the caller keeps also keeps its neighbours in
    memory.
    """
    module_name = _module_name(path)
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as handle:
            names = list(handle.keys())
        for begin in range(0, len(names), _MAPPED_TOGETHER):
            # what was read of a mapped file stays in memory until the mapping's last tensor is
            # freed
            with safe_open(file, framework="pt") as handle:
                for name in names[begin : begin + _MAPPED_TOGETHER]:
                    yield module_name(name), handle.get_tensor(name)


def packed_linear_names(path: str | Path) -> set[str]:
    """Returns the full module names of the linears that a checkpoint holds in NVFP4."""
    names: set[str] = set()
    module_name = _module_name(path)
    for file in checkpoint_files(path):
        with safe_open(file, framework="pt") as handle:
            packed = (key for key in handle.keys() if key.endswith(_PACKED_SUFFIX))
            names |= {module_name(key.removesuffix(_PACKED_SUFFIX)) for key in packed}
    return names


def swap_linears(
    model: nn.Module,
    names: set[str],
    dtype: torch.dtype,
    storage_dtype: torch.dtype = torch.uint8,
) -> None:
    """Replaces linears and experts of a model by empty NVFP4 modules on the same device.

    Each named ``nn.Linear`` becomes an :class:`NVFP4Linear`. Experts whose linears are named become
    :class:`NVFP4Experts`. See :func:`keep_float32` for what else becomes of a model.

    Args:
        model: built from the checkpoint's configuration, usually on the meta device.
        names: see :func:`packed_linear_names`.
        dtype: dtype of the biases.
        storage_dtype: see :class:`NVFP4Linear`.

    Raises:
        ValueError: a name is not a linear layer of the model; or only some of a layer's experts are
            named.
    """
    modules = dict(model.named_modules())
    of_experts: dict[str, set[str]] = {}
    for name in names:
        if (found := _EXPERT_LINEAR.fullmatch(name)) and found[1] in modules:
            of_experts.setdefault(found[1], set()).add(name)
    for name, linears in sorted(of_experts.items()):
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, _empty_experts(name, modules[name], linears, storage_dtype))
    for name in sorted(names.difference(*of_experts.values())):
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
    keep_float32(model)


def keep_float32(model: nn.Module) -> None:
    """Makes buffers in float32 of the frozen parameters that vLLM holds in float32.

    These are the decays of delta nets (``A_log`` in
    vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py). FSDP2 does not cast buffers.
    """
    for module in model.modules():
        if isinstance(parameter := module._parameters.get(_DECAY), nn.Parameter):
            del module._parameters[_DECAY]
            module.register_buffer(_DECAY, parameter.detach().float())


def exact_buffers(model: nn.Module) -> set[str]:
    """Returns the full names of the buffers of :func:`keep_float32`."""
    return {name for name, _ in model.named_buffers() if name.rpartition(".")[2] == _DECAY}


_DECAY = "A_log"
_EXPERT_LINEAR = re.compile(r"(.+)\.\d+\.(?:gate|up|down)_proj")


def _empty_experts(name: str, experts: nn.Module, linears: set[str], storage_dtype: torch.dtype) -> NVFP4Experts:
    """Returns the empty module that replaces transformers' experts.

    Those are ``gate_up_proj`` ``[E, 2 I, H]`` and ``down_proj`` ``[E, H, I]``.

    Raises:
        ValueError: ``experts`` has no such parameters, or ``linears`` are not all of its linears.
    """
    try:
        count, hidden, inner = experts.down_proj.shape
        device = experts.down_proj.device
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint holds the experts of {name} in NVFP4, but the model has none there"
        ) from error
    expected = {f"{name}.{expert}.{projection}" for expert in range(count) for projection in PROJECTIONS}
    if linears != expected:
        odd = sorted(expected ^ linears)[0]
        raise ValueError(
            f"{name}: the checkpoint packs {len(linears)} linears of {count} experts; {odd} is missing or extra"
        )
    try:
        return NVFP4Experts(count, hidden, inner, experts.act_fn, device=device, storage_dtype=storage_dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def load_tensors(model: nn.Module, path: str | Path, dtype: torch.dtype, new_modules: tuple[str, ...] = ()) -> None:
    """Loads a checkpoint's tensors into a model of :func:`swap_linears`, one at a time.

    Args:
        model: its parameters may be on the meta device; they are replaced, not copied into.
        path: the checkpoint folder.
        dtype: dtype of everything that is neither packed nor a buffer of :func:`keep_float32`.
        new_modules: prefixes of modules that the checkpoint does not have (a value head). They keep
            their values.

    Raises:
        ValueError: a shape does not fit, or tensors are missing in the model or the checkpoint.
    """
    holders = _parts(model)
    parts = {name: part for part in holders for name in part.places()}
    exact = exact_buffers(model)
    expected = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    persistent = set(model.state_dict(keep_vars=True)).difference(*(part.holds for part in holders)) | set(parts)
    loaded, unexpected = set(), []
    for name, tensor in iterate_tensors(path):
        if is_unused(name):
            continue
        if name not in persistent:
            unexpected.append(name)
            continue
        target = parts[name].places()[name] if name in parts else expected[name]
        if name.endswith((".weight_packed", ".weight_scale")):
            tensor = tensor.view(torch.uint8)
        elif name.endswith(".weight_global_scale"):
            tensor = tensor.to(torch.float32).reshape(1)
        elif tensor.is_floating_point():
            tensor = tensor.to(target.dtype if name in exact else dtype)
        if tensor.shape != target.shape:
            raise ValueError(
                f"{name} of {path} has shape {tuple(tensor.shape)}, the model expects {tuple(target.shape)}"
            )
        if name in parts:
            parts[name].fill(name, tensor)
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
) -> str:
    """Chooses the kernels of all NVFP4 layers and converts the weights into their layout.

    The layers are converted one by one on ``device``.

    Args:
        model: its tensors stay where they are; layers on the meta device only get the kernels.
        device: where the model will compute.
        wanted: ``qerl.kernel``.
        dtype: dtype of the activations.
        elsewhere: name of a backend -> why it cannot run on another rank. The ranks share the
            bytes, so all of them need one layout.

    Returns:
        The kernel of each kind of layer with the number of layers, and why no better one serves,
        for the line ``[qerl] kernel:``.

    Raises:
        ValueError: a requested kernel cannot run here or does not serve a layer, which is named.
    """
    count, backends = KernelCount(), {}
    for name, layer in model.named_modules():
        if isinstance(layer, NVFP4Linear):
            choice = layer.use_backend(device, wanted, dtype, name=name, elsewhere=elsewhere)
            count.add(name, choice, device)
            backends[layer.out_features, layer.in_features] = layer.backend
        elif isinstance(layer, NVFP4Experts):
            choices = layer.use_backend(device, wanted, dtype, name=name, elsewhere=elsewhere)
            for stack, choice in choices.items():
                count.add(f"{name}.{stack}", choice, device)
    for shape, backend in backends.items():
        if said := backend.tune(device, *shape):
            say(f"kernel: {said}")
    return str(count)


class _Parts:
    """A module each of whose parameters holds several tensors of the checkpoint.

    Attributes:
        holds: full names of those parameters and buffers.

    Args:
        name: full name of the module.
        module: an NVFP4 layer, or transformers' experts in 16 bits.
    """

    def __init__(self, name: str, module: nn.Module):
        self._prefix, self._module = f"{name}.", module
        leaves: tuple[str, ...]
        if isinstance(module, NVFP4Linear):
            leaves = ("weight_joined",)
        elif isinstance(module, NVFP4Experts):
            leaves = ("weight_joined", "weight_global_scale")
        else:
            leaves = tuple(STACKS)
        self.holds = {self._prefix + leaf for leaf in leaves}
        self._leaves, self._places = leaves, self._find()

    def _find(self) -> dict[str, torch.Tensor]:
        module = self._module
        if isinstance(module, NVFP4Linear):
            packed, scale = module.weight_bytes()
            parts = {"weight_packed": packed, "weight_scale": scale}
        elif isinstance(module, NVFP4Experts):
            parts = module.parts()
        else:
            parts = {
                f"{expert}.{projection}.weight": piece
                for stack, projections in STACKS.items()
                for expert, rows in enumerate(getattr(module, stack).detach())
                for projection, piece in zip(projections, rows.chunk(len(projections)), strict=True)
            }
        return {self._prefix + name: view for name, view in parts.items()}

    def places(self) -> dict[str, torch.Tensor]:
        """Returns full name of a checkpoint's tensor -> view of its memory."""
        return self._places

    def fill(self, name: str, tensor: torch.Tensor) -> None:
        """Copies a tensor to its place. The first call allocates the module's memory."""
        if self._places[name].is_meta:
            for leaf in self._leaves:
                empty = torch.empty_like(getattr(self._module, leaf), device=tensor.device)
                if leaf in self._module._parameters:
                    empty = nn.Parameter(empty, requires_grad=False)
                setattr(self._module, leaf, empty)
            self._places = self._find()
        self._places[name].copy_(tensor)


def _parts(model: nn.Module) -> list[_Parts]:
    """Returns the modules of a model that hold several checkpoint tensors in one parameter."""
    return [
        _Parts(name, module)
        for name, module in model.named_modules()
        if isinstance(module, NVFP4Linear) or is_experts(module)
    ]


def _assign(model: nn.Module, name: str, tensor: torch.Tensor, requires_grad: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=requires_grad)
    else:
        module._buffers[leaf] = tensor
