"""Loads the shared base once for actor, critic and rollout: the actor's side."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import nn
from verl.utils.model import get_hf_auto_model_class
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.config import HFModelConfig

from qerl_verl.finite import gather_first
from qerl_verl.job import Job, find_job
from qerl_verl.log_lines import say
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.candidates import CANDIDATES
from qerl_verl.nvfp4.loading import packed_linear_names, swap_linears
from qerl_verl.sharing.base import OtherSide, attach, load_base, plan_layout
from qerl_verl.sharing.channel import BaseOwner
from qerl_verl.sharing.errors import SharingError
from qerl_verl.sharing.layout import Layout
from qerl_verl.sharing.memory import SharedMemory


@dataclass
class Base:
    """A base in memory that other processes may map.

    Attributes:
        memory: the memory that holds all tensors.
        layout: where each tensor lies in it.
        kernels: the backends that compute its layers, for the line ``[qerl] kernel:``.
    """

    memory: SharedMemory
    layout: Layout
    kernels: str


_bases: dict[tuple, Base | str] = {}
"""The bases of this process, by checkpoint and layout; a string in place of a base is the reason
why there is none.
"""

_owners: dict[str, BaseOwner] = {}
"""By the job's key; they live as long as the process."""


def causal_lm(model: HFModelConfig, dtype: torch.dtype) -> nn.Module:
    """Returns a causal language model without weights, in ``dtype`` on the meta device."""
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_hf_auto_model_class(hf_config=model.hf_config).from_config(
            model.hf_config, dtype=dtype, trust_remote_code=model.trust_remote_code
        )


def use_shared_base(
    module: nn.Module,
    model: HFModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    kernel: str,
    serves: bool,
) -> str | None:
    """Gives a model the base that actor, critic and rollout share (``qerl.base``). A collective
    call.

    Args:
        module: the model with empty NVFP4 layers.
        model: its configuration.
        device: the device that computes.
        dtype: dtype of unpacked tensors.
        compute_dtype: dtype of the activations.
        kernel: ``qerl.kernel``.
        serves: whether this is the actor's model, whose base the rollout maps.

    Returns:
        What computes the layers, as from :func:`~qerl_verl.nvfp4.loading.prepack_linears`; None
        where the model has to load a base of its own.

    Raises:
        SharingError: with ``qerl.base=shared``, why the base cannot be shared.
    """
    job, rank = find_job(), torch.distributed.get_rank()
    sharing = None if job is None else job.sharing
    if job is None or sharing is None or not (serves or model.path == sharing.model):
        return None
    key = (model.local_path, device, dtype, compute_dtype, kernel)
    if key not in _bases:
        _bases[key] = _load(model, device, dtype, compute_dtype, kernel, job)
    base = _bases[key]
    if serves and sharing.key not in _owners:
        _owners[sharing.key] = BaseOwner(
            base if isinstance(base, str) else (base.memory, base.layout), sharing.key, rank
        )
    if isinstance(base, str):
        if job.settings.base == "shared" and serves:
            raise SharingError(f"qerl.base=shared: {base}; use qerl.base=separate")
        if rank == 0:
            say(f"base: a copy each: {base}")
        return None
    attach(module, base.layout, base.memory.data)
    if rank == 0:
        size = f"{base.layout.shared_bytes() / 2**30:.2f} GiB"
        say(f"base: the {'actor' if serves else 'critic'} uses the {size} on each device that are shared")
    return base.kernels


def _load(
    model: HFModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    kernel: str,
    job: Job,
) -> Base | str:
    """Returns the base, or the reason why it cannot be shared, the same on every rank."""
    rank = job.lora.rank if job.lora else None
    wanted = job.settings.rollout.kernel
    other = OtherSide(wanted, CANDIDATES, rank, PrecisionType.to_dtype(job.dtype))
    plain, reason = causal_lm(model, dtype), None
    swap_linears(plain, packed_linear_names(model.local_path), dtype)
    plain.requires_grad_(False)
    try:
        layout = plan_layout(plain, get_architecture(model.hf_config), device, compute_dtype, kernel, other)
        memory = SharedMemory.allocate(layout.size, device)
    except SharingError as error:
        reason = str(error)
    if reason := gather_first(reason):
        return reason
    layout, kernels = load_base(plain, model.local_path, layout, memory, dtype, compute_dtype, kernel)
    return Base(memory, layout, kernels)
