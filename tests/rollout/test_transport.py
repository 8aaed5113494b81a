"""Tests the checkpoint engine between an actor of two ranks and three rollout workers, in
threads."""

import asyncio
import hashlib
import io
import socket
import socketserver
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import ray
import torch
from verl.checkpoint_engine import CheckpointEngineRegistry

from qerl_verl.config.rules import TRANSPORT
from qerl_verl.rollout import transport
from qerl_verl.rollout.transport import AdapterClient, AdapterServer, AdapterTransport, TransportError


@pytest.fixture(autouse=True)
def on_this_host(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def connected(ranks=2, workers=3, **settings):
    """Connects senders and receivers as verl's build_process_group does
    (verl/checkpoint_engine/base.py).
    """
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
    """Runs a sync; returns what each receiver got, and how many tensors each sender was asked
    for."""
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
        "large": torch.randn(2**19 + 3, 2),  # more than a socket takes at once
        "config": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(3, 5).bfloat16(),
    }
    senders, receivers = connected()
    for _ in range(2):  # a sync has a port and a secret of its own
        got, asked = sync(senders, receivers, tensors)
        assert asked == [len(tensors)] * 2
        for found in got:
            assert list(found) == list(tensors)
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        assert all(engine.server is engine.client is None for engine in (*senders, *receivers))
        senders, receivers = connected()


def test_a_sender_that_says_nothing_is_not_waited_for_for_ever():
    (sender, _), (receiver,) = connected(workers=1, timeout_s=0.5)
    with pytest.raises(TransportError, match=r"no adapter came from 127.0.0.1:\d+ within 0.5 s"):
        receive(receiver)
    sender.finalize()


def test_a_sender_that_has_gone_is_noticed():
    (sender, _), (receiver,) = connected(workers=1)
    with ThreadPoolExecutor(1) as thread:
        got = thread.submit(receive, receiver)
        sender.finalize()
        with pytest.raises(TransportError, match="went before its adapter was here"):
            got.result(timeout=30)
    with pytest.raises(TransportError, match="cannot be fetched from 127.0.0.1"):
        receiver.init_process_group(("127.0.0.1", free_port(), b"secret"))


def test_an_address_that_is_not_this_nodes_is_named(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.7")
    with pytest.raises(TransportError, match="cannot listen on 203.0.113.7.*--node-ip-address"):
        AdapterTransport(1, is_master=True).prepare()


# --- from outside the job ---


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture
def server():
    made = AdapterServer("127.0.0.1", timeout_s=5)
    made.offer(memoryview(b"the adapter"))
    yield made
    made.close()


def address(server, secret=None):
    return "127.0.0.1", server.server_address[1], secret or server.secret


def test_whoever_knows_the_secret_gets_the_adapter(server):
    client = AdapterClient(address(server), 5)
    assert client.fetch() == b"the adapter"
    client.close()


@pytest.mark.parametrize("other", ["127.0.0.2", "::1"])
def test_it_listens_on_the_address_of_its_node_alone(server, other):
    with pytest.raises(OSError):
        socket.create_connection((other, server.server_address[1]), timeout=5)


def answer_wrong(connection, nonce):
    connection.sendall(b"r" * 32 + b"t" * 32)


def answer_with_the_nonce_alone(connection, nonce):
    connection.sendall(b"r" * 32 + transport._tag(b"", b"receiver", nonce, b"r" * 32))


def say_http(connection, nonce):
    connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: something that makes it longer\r\n\r\n")


def hang_up(connection, nonce):
    connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("behaviour", [answer_wrong, answer_with_the_nonce_alone, say_http, hang_up])
def test_whoever_does_not_know_the_secret_gets_nothing(server, behaviour):
    with socket.create_connection(address(server)[:2], timeout=5) as connection:
        nonce = transport._read(connection, 32)
        behaviour(connection, bytes(nonce))
        try:
            said = connection.recv(1)
        except ConnectionResetError:
            said = b""
        assert said == b""
    test_whoever_knows_the_secret_gets_the_adapter(server)


def test_a_recorded_answer_does_not_open_another_connection(server):
    """The tag covers the sender's random bytes, which are new for each connection."""
    with socket.create_connection(address(server)[:2], timeout=5) as connection:
        nonce = bytes(transport._read(connection, 32))
        recorded = b"r" * 32 + transport._tag(server.secret, b"receiver", nonce, b"r" * 32)
        connection.sendall(recorded)
        assert connection.recv(1)
    with socket.create_connection(address(server)[:2], timeout=5) as connection:
        transport._read(connection, 32)
        connection.sendall(recorded)
        assert connection.recv(1) == b""


def test_one_that_says_nothing_is_let_go_and_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(transport, "HANDSHAKE_SECONDS", 0.2)
    server = AdapterServer("127.0.0.1", timeout_s=5)
    server.offer(memoryview(b"the adapter"))
    with socket.create_connection(address(server)[:2], timeout=5) as silent:
        test_whoever_knows_the_secret_gets_the_adapter(server)
        transport._read(silent, 32)
        assert silent.recv(1) == b""
    server.close()


def pretend(secret, adapter, digest=None):
    """Starts a server at another address than the actor's, which sends the given bytes for the
    adapter.
    """

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.sendall(b"s" * 32)
            theirs = bytes(transport._read(self.request, 64)[:32])
            header = struct.pack("!Q", len(adapter)) + (digest or hashlib.sha256(adapter).digest())
            self.request.sendall(header + transport._tag(secret, b"sender", b"s" * 32, theirs, header) + adapter)

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


SECRET = b"x" * 32


@pytest.mark.parametrize(
    ("secret", "digest", "said"),
    [
        (b"guessed", None, "is not this job's actor"),
        (SECRET, b"d" * 32, "was changed on its way"),
        (SECRET, None, None),
    ],
)
def test_an_adapter_of_another_sender_is_not_even_parsed(monkeypatch, secret, digest, said):
    adapter = io.BytesIO()
    torch.save({"a": torch.ones(2)}, adapter)
    server = pretend(secret, adapter.getvalue(), digest)
    receiver = AdapterTransport(1, timeout_s=5)
    receiver.init_process_group(address(server, SECRET))
    if said is None:
        assert torch.equal(receive(receiver)["a"], torch.ones(2))
    else:
        monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("parsed"))
        with pytest.raises(TransportError, match=said):
            receive(receiver)
    receiver.finalize()
    server.shutdown()
    server.server_close()


def test_verl_builds_it_from_its_configuration():
    from verl.workers.config import CheckpointEngineConfig

    config = CheckpointEngineConfig(backend=TRANSPORT, engine_kwargs={TRANSPORT: {"timeout_s": 5}})
    assert SimpleNamespace(**config).backend in CheckpointEngineRegistry._registry
    engine = CheckpointEngineRegistry.new(TRANSPORT, bucket_size=1, **config.engine_kwargs[TRANSPORT])
    assert type(engine) is AdapterTransport and engine.timeout_s == 5
