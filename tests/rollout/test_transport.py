"""The checkpoint engine between an actor of two ranks and three rollout workers, in threads of one process."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import ray
import torch
from verl.checkpoint_engine import CheckpointEngineRegistry

from qerl_verl.config.rules import TRANSPORT
from qerl_verl.rollout.transport import CHUNK, AdapterTransport


@pytest.fixture(autouse=True)
def on_this_host(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def connected(ranks=2, workers=3, **settings):
    """Senders and receivers after verl's build_process_group (verl/checkpoint_engine/base.py)."""
    new = CheckpointEngineRegistry.new
    senders = [new(TRANSPORT, bucket_size=1, is_master=rank == 0, **settings) for rank in range(ranks)]
    receivers = [new(TRANSPORT, bucket_size=1, **settings) for _ in range(workers)]
    metadata = [engine.prepare() for engine in (*senders, *receivers)]
    topology = CheckpointEngineRegistry.get(TRANSPORT).build_topology(ranks, workers, metadata)
    for group, arguments in zip((senders, receivers), topology, strict=True):
        for i, engine in enumerate(group):
            assert all(len(values) == len(group) for values in arguments.values())
            engine.init_process_group(**{name: values[i] for name, values in arguments.items()})
    return senders, receivers


def receive(engine):
    async def collect():
        return [item async for item in engine.receive_weights(global_steps=3)]

    return dict(asyncio.run(collect()))


def sync(senders, receivers, tensors):
    """What each receiver got, and how many tensors each sender was asked for."""
    asked = [0] * len(senders)

    def generator(rank):
        for item in tensors.items():
            asked[rank] += 1
            yield item

    with ThreadPoolExecutor(8) as threads:
        got = [threads.submit(receive, engine) for engine in receivers]
        sent = [threads.submit(asyncio.run, e.send_weights(generator(i), 3)) for i, e in enumerate(senders)]
        assert [s.result() for s in sent] == [None] * len(senders)
        got = [g.result() for g in got]
    for engine in (*senders, *receivers):
        engine.finalize()
    return got, asked


def test_every_worker_receives_every_tensor_and_each_rank_walks_its_generator():
    tensors = {
        "a.lora_A.weight": torch.randn(8, 64),
        "a.lora_B.weight": torch.randn(64, 8).T,  # not contiguous
        "large": torch.randn(CHUNK // 4 + 3, 2),
        "config": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
    }
    senders, receivers = connected()
    for _ in range(2):  # a sync opens a store of its own
        got, asked = sync(senders, receivers, tensors)
        assert asked == [len(tensors)] * 2
        for found in got:
            assert list(found) == list(tensors)
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert all(engine.store is None for engine in (*senders, *receivers))
        senders, receivers = connected()


def test_a_sender_that_says_nothing_is_not_waited_for_for_ever():
    _, (receiver,) = connected(workers=1, timeout_s=0.5)
    with pytest.raises(torch.distributed.DistStoreError, match="timeout"):
        receive(receiver)


def test_a_sender_that_has_gone_is_noticed():
    (sender, _), (receiver,) = connected(workers=1)
    with ThreadPoolExecutor(1) as thread:
        got = thread.submit(receive, receiver)
        sender.finalize()
        with pytest.raises(torch.distributed.DistError):
            got.result(timeout=30)


def test_verl_builds_it_from_its_configuration():
    from verl.workers.config import CheckpointEngineConfig

    config = CheckpointEngineConfig(backend=TRANSPORT, engine_kwargs={TRANSPORT: {"timeout_s": 5}})
    assert SimpleNamespace(**config).backend in CheckpointEngineRegistry._registry
    engine = CheckpointEngineRegistry.new(TRANSPORT, bucket_size=1, **config.engine_kwargs[TRANSPORT])
    assert type(engine) is AdapterTransport and engine.timeout.total_seconds() == 5
