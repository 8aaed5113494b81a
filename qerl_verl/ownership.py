"""Records which process made a file or folder, to know before a removal whether that process lives.

A process number identifies a process only on one host, since one boot, in one PID namespace
(containers on one host share its boot, and two hosts can share a folder). An owner therefore
consists of all of these and the process's start time. A process that cannot be seen from here is
"unknown". Only what belongs to a dead process is removed.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["alive", "dead", "unknown"]


@dataclass(frozen=True)
class Owner:
    """Identifies a process for good. A field is empty where the system does not tell it."""

    host: str
    boot: str
    """Random identifier of the kernel's boot (random(4), ``boot_id``)."""
    namespaces: str
    """PID namespace (for process numbers) and time namespace (for start times), see
    namespaces(7)."""
    process: int
    start: str
    """Start of the process in clock ticks since the boot (proc(5), field 22 of ``stat``)."""

    @classmethod
    def current(cls) -> Owner:
        """Returns this process."""
        return cls(host_name(), _boot(), _namespaces(), os.getpid(), _start_time(os.getpid()))

    @classmethod
    def read(cls, file: Path) -> Owner | None:
        """Reads the result of :meth:`write`; returns None if the file is missing or not valid."""
        try:
            owner = cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        texts = (owner.host, owner.boot, owner.namespaces, owner.start)
        valid = isinstance(owner.process, int) and owner.process > 0 and all(isinstance(text, str) for text in texts)
        return owner if valid else None

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def state(self) -> State:
        """Returns whether the process lives.

        It is ``unknown`` if the process belongs to another host, boot or namespace, or cannot be
        examined.
        """
        here = Owner.current()
        place = (self.host, self.boot, self.namespaces)
        if not all((*place, self.start)) or place != (here.host, here.boot, here.namespaces):
            return "unknown"
        try:
            os.kill(self.process, 0)  # also finds a process that /proc hides (proc(5), hidepid)
        except (ProcessLookupError, OverflowError):
            return "dead"
        except PermissionError:  # it belongs to another user
            pass
        start = _start_time(self.process)
        if not start:
            return "unknown"
        return "alive" if start == self.start and not _is_zombie(self.process) else "dead"

    def __str__(self) -> str:
        return f"process {self.process} on {self.host or 'an unnamed host'}"


def host_name() -> str:
    return socket.gethostname() or "unknown"


def state_of(file: Path) -> State:
    """Returns the state of the owner that ``file`` names, ``unknown`` without one."""
    owner = Owner.read(file)
    return "unknown" if owner is None else owner.state()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespaces() -> str:
    try:
        names = [os.readlink("/proc/self/ns/pid")]
    except OSError:
        return ""
    if os.path.lexists("/proc/self/ns/time"):  # since Linux 5.6
        names.append(os.readlink("/proc/self/ns/time"))
    return " ".join(names)


def _stat(process: int) -> list[str]:
    """Returns ``stat`` from its third field on (proc(5)); empty if the process is gone or
    hidden."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _start_time(process: int) -> str:
    fields = _stat(process)
    return fields[19] if len(fields) > 19 else ""


def _is_zombie(process: int) -> bool:
    return _stat(process)[:1] in (["Z"], ["X"])
