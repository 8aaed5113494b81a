"""Hands a shared base from its owner to another process of the same host.

The owner listens on a Unix socket in Linux's abstract namespace (unix(7)), which has no file and
ends with the process. A client must belong to the same user and send the job's key. It receives the
layout and the handle of the memory, and keeps the connection open. The kernel closes the connection
when the owner ends for any reason, which tells the client.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from qerl_verl.sharing.errors import SharingError
from qerl_verl.sharing.layout import Layout
from qerl_verl.sharing.memory import Handle, SharedMemory, open_memory

CONNECT_SECONDS = 10.0
"""How long a client tries to reach the owner, which is there before the client starts."""

ANSWER_SECONDS = 60.0

GRACE_SECONDS = 15.0
"""Time between the end of the owner and that of a process that still maps the memory. An orderly
end of the job comes first, and ends the process without a message."""

_LENGTH = struct.Struct("<Q")


def address(key: str, rank: int) -> str:
    """Returns the socket address of one rank's base. The key cannot be derived from it."""
    return f"\0qerl-base-{hashlib.sha256(f'{key} {rank}'.encode()).hexdigest()[:32]}"


class BaseOwner:
    """Hands a base to every process that knows the key, until this process ends.

    Args:
        base: the memory with its content, and its layout; or the reason why there is no base.
        key: the job's key.
        rank: rank of the process among those that own a base in this job.

    Raises:
        SharingError: another process listens under this key and rank.
    """

    def __init__(self, base: tuple[SharedMemory, Layout] | str, key: str, rank: int):
        self._key = key
        self._memory: SharedMemory | None = None
        answer: dict[str, Any]
        if isinstance(base, str):
            answer = {"declined": base}
        else:
            self._memory, layout = base
            answer = {"handle": asdict(self._memory.handle), "layout": layout.to_json()}
        self._answer = json.dumps(answer).encode()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.bind(address(key, rank))
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            raise SharingError(f"the owner of the base cannot listen on a Unix socket: {error}") from error
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._serve, name="shared base", daemon=True).start()

    def close(self) -> None:
        """Stops listening and closes all connections."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._connections:
            connection.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # the socket was closed
                return
            threading.Thread(target=self._hand_over, args=(connection,), daemon=True).start()

    def _hand_over(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(ANSWER_SECONDS)
            _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            key = _read(connection, len(self._key))
            if user != os.getuid() or not hmac.compare_digest(key, self._key.encode()):
                connection.close()
                return
            descriptor = None if self._memory is None else self._memory.descriptor
            head = _LENGTH.pack(len(self._answer))
            socket.send_fds(connection, [head], [] if descriptor is None else [descriptor])
            connection.sendall(self._answer)
            self._connections.append(connection)  # its end shows that this process ended
        except OSError:
            connection.close()


class SharedBase:
    """A base that another process owns, mapped into this one.

    Attributes:
        layout: places of the tensors.
        data: ``[size]`` uint8, on this process's device.
    """

    def __init__(self, layout: Layout, data: torch.Tensor, connection: socket.socket):
        self.layout, self.data, self._connection = layout, data, connection

    @classmethod
    def connect(cls, key: str, rank: int, device: torch.device, timeout_s: float = CONNECT_SECONDS) -> SharedBase:
        """Maps the base of the owner with ``key`` and ``rank``.

        Raises:
            SharingError: nobody listens, the owner has no base or another key, or the memory cannot
                be mapped.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end = time.monotonic() + timeout_s
        while True:
            try:
                connection.connect(address(key, rank))
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise SharingError(f"no process on this host owns the base of rank {rank}: {error}") from error
                time.sleep(0.05)
        try:
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(key.encode())
            head, descriptors, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
            head += _read(connection, _LENGTH.size - len(head))
            answer = json.loads(_read(connection, *_LENGTH.unpack(head)))
            if "declined" in answer:
                raise SharingError(answer["declined"])
            data = open_memory(Handle(**answer["handle"]), descriptors[0] if descriptors else None, device)
            layout = Layout.from_json(answer["layout"])
        except (OSError, ValueError) as error:
            connection.close()
            raise SharingError(f"the owner of the base did not hand it over: {error}") from error
        except SharingError:
            connection.close()
            raise
        return cls(layout, data, connection)

    def watch(self, ended: Callable[[], None] | None = None, grace_s: float = GRACE_SECONDS) -> None:
        """Starts a thread that calls ``ended`` once the owner is gone.

        Args:
            ended: by default, prints a line to stderr and ends this process with exit code 1,
                because the mapped memory may be freed.
            grace_s: seconds for the job to end this process first.
        """

        def wait() -> None:
            self._connection.settimeout(None)
            try:
                while self._connection.recv(1):
                    pass
            except OSError:
                pass
            time.sleep(grace_s)
            (ended or _end_process)()

        threading.Thread(target=wait, name="owner of the shared base", daemon=True).start()

    def close(self) -> None:
        """Ends the connection; the memory stays mapped."""
        self._connection.close()


def _end_process() -> None:
    line = (
        f"[qerl] the process that owns the base is gone, so this one ({os.getpid()}) ends: it computes with that base"
    )
    os.write(2, f"{line}\n".encode())  # print may block: the process can be in any state
    os._exit(1)


def _read(connection: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        if not (part := connection.recv(min(size - len(received), 1 << 20))):
            raise OSError("the connection has ended")
        received += part
    return bytes(received)
