"""A checkpoint engine of verl's for adapters: from the actor to rollout engines in other processes, through a TCPStore.

verl's own (nccl, nixl and others) are made for whole models and want GPUs. An adapter is small, and torch's key-value store
carries it between any two hosts, without a process group and without a device. The actor's first rank opens a store for each
sync, puts the adapter in, and every rollout worker takes it out.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta

import ray
import torch
from torch.distributed import TCPStore
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from qerl_verl.config.rules import TRANSPORT

CHUNK = 4 << 20
"""Bytes of one value; the store takes 8 MiB at most (torch/csrc/distributed/c10d/TCPStoreLibUvBackend.cpp)."""


@CheckpointEngineRegistry.register(TRANSPORT)
class AdapterTransport(CheckpointEngine):
    """``actor_rollout_ref.rollout.checkpoint_engine.backend=qerl``.

    Args:
        bucket_size: verl passes it; not used.
        is_master: whether this is the actor's first rank, which sends.
        timeout_s: how long a rollout worker waits for the adapter, in seconds
            (``checkpoint_engine.engine_kwargs.qerl.timeout_s``).
    """

    def __init__(self, bucket_size: int, is_master: bool = False, timeout_s: float = 600.0):
        self.is_master = is_master
        self.timeout = timedelta(seconds=timeout_s)
        self.store: TCPStore | None = None

    def prepare(self) -> tuple[str, int] | None:
        """The sender's address and port; None from everyone else."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=self.timeout)
        return host, self.store.port

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list):
        """Every rollout worker learns the address; the actor's other ranks have no part in it."""
        return {"address": [None] * actor_wg_world_size}, {"address": [metadata[0]] * rollout_world_size}

    def init_process_group(self, address: tuple[str, int] | None) -> None:
        if address is not None:
            self.store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=self.timeout)

    def finalize(self) -> None:
        """Ends the sync: the sender's store goes, and with it the adapter's bytes."""
        self.store = None

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        tensors = {name: tensor.cpu() for name, tensor in weights}  # on every rank: a generator may be collective
        if not self.is_master:
            return
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        data = buffer.getbuffer()
        await asyncio.to_thread(self._put, data)

    def _put(self, data: memoryview) -> None:
        for number, begin in enumerate(range(0, len(data), CHUNK)):
            self.store.set(str(number), bytes(data[begin : begin + CHUNK]))
        self.store.set("chunks", str(math.ceil(len(data) / CHUNK)))

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yields: names and tensors, on the host.

        Raises:
            torch.distributed.DistError: nothing came in time, or the sender is gone.
        """
        data = await asyncio.to_thread(self._get)
        for name, tensor in torch.load(io.BytesIO(data), weights_only=True).items():
            yield name, tensor

    def _get(self) -> bytes:
        count = int(self.store.get("chunks"))
        return b"".join(self.store.get(str(number)) for number in range(count))
