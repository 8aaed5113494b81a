"""Implements a checkpoint engine of verl that sends adapters over TCP to rollout engines.

verl's own engines (nccl, nixl and others) are made for whole models and need GPUs. An adapter is
small, and a socket carries it between any two hosts without a process group or a device. For each
sync the actor's first rank listens on its node's address and sends the adapter to every rollout
worker that knows the secret of this sync. Address and secret go through Ray, in the topology that
verl builds.

The protocol, with S and R as 32 random bytes of the sender and the receiver, and ``tag`` as
HMAC-SHA256 with the secret:

1. sender: S
2. receiver: R, tag("receiver", S, R)
3. sender, once it has the adapter: length, SHA-256 of the adapter, tag("sender", S, R, length,
   SHA-256); then the adapter

Each side closes the connection when a tag or the digest is wrong. The adapter is not encrypted.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import io
import secrets
import socket
import socketserver
import struct
import threading
from collections.abc import AsyncIterator, Iterable

import ray
import torch
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from qerl_verl.config.rules import TRANSPORT

NONCE_BYTES = TAG_BYTES = hashlib.sha256().digest_size
HANDSHAKE_SECONDS = 30.0
"""How long either side waits for the other side's part of steps 1 and 2."""

_LENGTH = struct.Struct("!Q")


class TransportError(RuntimeError):
    """An adapter was not transferred from the actor to a rollout worker."""


def _tag(secret: bytes, who: bytes, *parts: bytes) -> bytes:
    """Returns the tag of a message.

    All parts except the side's name have fixed lengths, so no two messages have the same bytes.
    """
    return hmac.digest(secret, b"".join((who, *parts)), "sha256")


def _read(connection: socket.socket, size: int) -> bytearray:
    """Reads exactly ``size`` bytes.

    Raises:
        ConnectionError: the other side closed the connection before.
    """
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("the connection was closed")
        view = view[count:]
    return data


class _Handler(socketserver.BaseRequestHandler):
    """Serves one connection at the sender, in a thread of its own."""

    server: AdapterServer

    def handle(self) -> None:
        try:
            self._serve(self.request)
        except OSError:  # closed, silent or gone; a receiver of this job reports the error itself
            pass

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(HANDSHAKE_SECONDS)
        ours = secrets.token_bytes(NONCE_BYTES)
        connection.sendall(ours)
        theirs = bytes(_read(connection, NONCE_BYTES))
        tag = _read(connection, TAG_BYTES)
        if not hmac.compare_digest(tag, _tag(self.server.secret, b"receiver", ours, theirs)):
            return
        self.server.ready.wait()
        if (adapter := self.server.adapter) is None:  # the sync ended without an adapter
            return
        connection.settimeout(self.server.timeout_s)
        header = _LENGTH.pack(len(adapter)) + self.server.digest
        connection.sendall(header + _tag(self.server.secret, b"sender", ours, theirs, header))
        connection.sendall(adapter)


class AdapterServer(socketserver.ThreadingTCPServer):
    """Sends one adapter to every client that proves to know ``secret``.

    Args:
        host: the only address to listen on; the port is any free one.
        timeout_s: seconds that a receiver may take to accept more bytes.

    Raises:
        TransportError: this node does not have the address.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, timeout_s: float):
        self.secret = secrets.token_bytes(TAG_BYTES)
        self.timeout_s = timeout_s
        self.adapter: memoryview | None = None
        self.digest = b""
        self.ready = threading.Event()
        try:
            self.address_family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
            super().__init__((str(address[0]), int(address[1])), _Handler)
        except OSError as error:
            raise TransportError(
                f"the adapter's transport cannot listen on {host}, the address that Ray knows this "
                f"node by ({error}): start Ray with --node-ip-address=ADDRESS, an address of this "
                "node that the rollout's nodes reach"
            ) from error
        threading.Thread(target=self.serve_forever, args=(0.1,), name="adapter transport", daemon=True).start()

    def offer(self, adapter: memoryview) -> None:
        """Makes ``adapter`` available to all receivers, connected already or later."""
        self.digest = hashlib.sha256(adapter).digest()
        self.adapter = adapter
        self.ready.set()

    def close(self) -> None:
        """Stops listening, releases waiting receivers, and drops the adapter."""
        self.shutdown()
        self.server_close()
        self.adapter = None
        self.ready.set()


class AdapterClient:
    """A rollout worker's side of a connection.

    Args:
        address: host, port and secret of an :class:`AdapterServer`.
        timeout_s: seconds to wait for the adapter.

    Raises:
        TransportError: nothing answers at the address.
    """

    def __init__(self, address: tuple[str, int, bytes], timeout_s: float):
        host, port, self._secret = address
        self._where, self._timeout_s = f"{host}:{port}", timeout_s
        failed = f"the actor's adapter cannot be fetched from {self._where}"
        try:
            self._connection = socket.create_connection((host, port), timeout=min(timeout_s, HANDSHAKE_SECONDS))
        except OSError as error:
            raise TransportError(f"{failed}: {error}") from error
        try:
            self._theirs = bytes(_read(self._connection, NONCE_BYTES))
            self._ours = secrets.token_bytes(NONCE_BYTES)
            self._connection.sendall(self._ours + _tag(self._secret, b"receiver", self._theirs, self._ours))
        except OSError as error:
            self.close()
            raise TransportError(f"{failed}: {error}") from error

    def fetch(self) -> bytearray:
        """Returns the bytes of the adapter after checking them.

        Raises:
            TransportError: nothing arrived in time, the sender is gone, or it is not this job's
                actor.
        """
        try:
            self._connection.settimeout(self._timeout_s)
            header = bytes(_read(self._connection, _LENGTH.size + TAG_BYTES))
            tag = _read(self._connection, TAG_BYTES)
            if not hmac.compare_digest(tag, _tag(self._secret, b"sender", self._theirs, self._ours, header)):
                raise TransportError(f"what listens on {self._where} is not this job's actor; its adapter is not used")
            adapter = _read(self._connection, *_LENGTH.unpack_from(header))
        except TimeoutError as error:
            raise TransportError(f"no adapter came from {self._where} within {self._timeout_s:g} s") from error
        except OSError as error:
            raise TransportError(f"the actor at {self._where} went before its adapter was here ({error})") from error
        if not hmac.compare_digest(hashlib.sha256(adapter).digest(), header[_LENGTH.size :]):
            raise TransportError(f"the adapter from {self._where} was changed on its way; it is not used")
        return adapter

    def close(self) -> None:
        self._connection.close()


@CheckpointEngineRegistry.register(TRANSPORT)
class AdapterTransport(CheckpointEngine):
    """``actor_rollout_ref.rollout.checkpoint_engine.backend=qerl``.

    Args:
        bucket_size: passed by verl; not used.
        is_master: whether this is the actor's first rank, which sends.
        timeout_s: seconds that a rollout worker waits for the adapter
            (``checkpoint_engine.engine_kwargs.qerl.timeout_s``).
    """

    def __init__(self, bucket_size: int, is_master: bool = False, timeout_s: float = 600.0):
        self.is_master = is_master
        self.timeout_s = timeout_s
        self.server: AdapterServer | None = None
        self.client: AdapterClient | None = None

    def prepare(self) -> tuple[str, int, bytes] | None:
        """Returns the sender's address, port and the secret of this sync; None on other ranks."""
        self.finalize()  # ends a sync that was interrupted
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        self.server = AdapterServer(host, self.timeout_s)
        return host, self.server.server_address[1], self.server.secret

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list):
        """Passes address and secret to every rollout worker. The actor's other ranks take no
        part."""
        return {"address": [None] * actor_wg_world_size}, {"address": [metadata[0]] * rollout_world_size}

    def init_process_group(self, address: tuple[str, int, bytes] | None) -> None:
        if address is not None:
            self.client = AdapterClient(address, self.timeout_s)

    def finalize(self) -> None:
        """Ends the sync: closes the connections and drops the adapter's bytes."""
        for end in (self.server, self.client):
            if end is not None:
                end.close()
        self.server = self.client = None

    async def send_weights(self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None) -> None:
        # on every rank, because the generator may be collective
        tensors = {name: tensor.cpu() for name, tensor in weights}
        if not self.is_master:
            return
        assert self.server is not None, "prepare comes first"
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        await asyncio.to_thread(self.server.offer, buffer.getbuffer())

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        """Yields names and tensors, on the host.

        Raises:
            TransportError: nothing arrived in time, the sender is gone, or it is not this job's
                actor.
        """
        assert self.client is not None, "init_process_group comes first"
        data = await asyncio.to_thread(self.client.fetch)
        for name, tensor in torch.load(io.BytesIO(data), weights_only=True).items():
            yield name, tensor
