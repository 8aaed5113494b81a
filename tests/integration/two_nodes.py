"""Two Ray nodes on one machine, for tests: a cluster that stands, and a node that can be taken
away.

Where the machine allows it (root, iproute2, namespaces), a node has a network, a host name,
processes, ``/tmp`` and ``/dev/shm`` of its own, and shares one folder with the other: what a second
host has and has not. Elsewhere the nodes are two Ray nodes of this host with folders for temporary
files of their own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PORT, DASHBOARD = 6399, 8299
START_SECONDS = 240

# Name, folder, then folders that the node shares with its host, then -- and what to run. Debian
# gives a host's own name a loopback address, as here.
_ENTER = """
set -e
hostname "$1"; folder=$2; shift 2
mkdir -p "$folder/tmp"
while [ "$1" != -- ]; do
    case $1 in /tmp/*) mkdir -p "$folder$1"; mount --rbind "$1" "$folder$1";; esac
    shift
done
shift
mount --rbind "$folder/tmp" /tmp
mount -t tmpfs -o size=4g tmpfs /dev/shm
exec "$@"
"""


def cluster_environment() -> dict[str, str]:
    """Returns the environment of a cluster that refuses clients without its token."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    return {name: value for name, value in environment.items() if name not in ("RAY_ADDRESS", "TMPDIR")}


def missing_isolation() -> str | None:
    """Returns why nodes cannot be kept apart on this machine, or None."""
    if os.getuid() != 0:
        return "not root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "no ip (iproute2) or no unshare (util-linux)"
    tried = subprocess.run(
        ["ip", "netns", "exec", "qerl-try", "unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
        if subprocess.run(["ip", "netns", "add", "qerl-try"], capture_output=True).returncode == 0
        else ["false"],
        capture_output=True,
        text=True,
    )
    subprocess.run(["ip", "netns", "del", "qerl-try"], capture_output=True)
    return None if tried.returncode == 0 else f"namespaces are not permitted ({tried.stderr.strip() or 'ip netns add'})"


@dataclass
class Node:
    """One Ray node.

    Attributes:
        name: its host name.
        address: its IP address.
        namespace: its network namespace, None where nodes share the host's.
    """

    name: str
    address: str
    folder: Path
    shared: tuple[Path, ...]
    namespace: str | None
    environment: Mapping[str, str]
    process: subprocess.Popen | None = None

    def start(self, head: Node | None = None) -> None:
        """Runs ``ray start``, as the head if there is none. The node lives until
        :meth:`take_away`."""
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / "ray"
        command = [
            str(BIN / "ray"), "start", "--block", f"--node-ip-address={self.address}", f"--node-name={self.name}",
            "--num-gpus=1", "--num-cpus=12", "--object-store-memory=200000000", "--disable-usage-stats",
        ]  # fmt: skip
        if head is None:
            command += ["--head", f"--port={PORT}", f"--dashboard-host={self.address}", f"--dashboard-port={DASHBOARD}"]
        else:
            command += [f"--address={head.address}:{PORT}"]
        environment = dict(self.environment)
        if self.namespace is None:
            temporary.mkdir(exist_ok=True)
            command += [f"--temp-dir={temporary}"]
            environment["TMPDIR"] = str(temporary)
        with open(self.folder / "ray_start.log", "ab") as log:
            self.process = subprocess.Popen(
                self._inside(command), env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _inside(self, command: list[str]) -> list[str]:
        if self.namespace is None:
            return command
        apart = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        enter = ["bash", "-c", _ENTER, "node", self.name, str(self.folder), *map(str, self.shared), "--"]
        return ["ip", "netns", "exec", self.namespace, *apart, *enter, *command]

    def from_outside(self, command: list[str]) -> list[str]:
        """Returns a command of somebody who reaches the node over the network and has not logged in
        to it."""
        return command if self.namespace is None else ["ip", "netns", "exec", self.namespace, *command]

    def processes(self) -> list[psutil.Process]:
        """Returns every process of the node."""
        if self.process is None or self.process.poll() is not None:
            return []
        return psutil.Process(self.process.pid).children(recursive=True)

    def take_away(self) -> None:
        """As if its power failed: every process is gone at once, and where it has a network of its
        own, nobody is told."""
        found = self.processes()
        if self.namespace is not None:
            _ip("-n", self.namespace, "link", "set", "eth1", "down")
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL) if self.process.poll() is None else None
            self.process.wait()
        for process in found:  # where no namespace ends them, and of sessions of their own
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(found, timeout=20)
        self.process = None

    def log(self) -> str:
        path = self.folder / "ray_start.log"
        return path.read_text(errors="replace") if path.exists() else ""


@dataclass
class TwoNodes:
    """A cluster of two nodes.

    Args:
        folder: for what belongs to a node alone.
        shared: a folder that both see under the same path.
        environment: of every process.
    """

    folder: Path
    shared: Path
    environment: Mapping[str, str]
    isolated: bool = field(default_factory=lambda: missing_isolation() is None)
    nodes: list[Node] = field(default_factory=list)

    def __enter__(self) -> TwoNodes:
        visible = (self.shared, ROOT, Path(sys.prefix))
        if self.isolated:
            self._connect()
        for i in (1, 2):
            name = f"qerl-node{i}" if self.isolated else socket.gethostname()
            address = f"10.213.77.{i}" if self.isolated else f"127.0.0.{i}"
            node = Node(
                name if self.isolated else f"{name}-{i}", address, self.folder / f"n{i}", visible,
                f"qerl-node{i}" if self.isolated else None, self.environment,
            )  # fmt: skip
            self.nodes.append(node)
        try:
            self.nodes[0].start()
            self.wait_for(1)
            self.nodes[1].start(self.nodes[0])
            self.wait_for(2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for node in reversed(self.nodes):
            node.take_away()
        if self.isolated:
            self._disconnect()

    def replace(self, index: int) -> None:
        """Brings a node that was taken away back, empty."""
        node = self.nodes[index]
        self.wait_for(1)
        if node.namespace is not None:
            _attach(node.namespace)
        # what was mounted in it has gone with the node
        shutil.rmtree(node.folder / "tmp", ignore_errors=True)
        node.start(self.nodes[0])
        self.wait_for(2)

    def wait_for(self, number: int) -> None:
        """Raises: AssertionError with the nodes' output, if there are not that many nodes in
        time."""
        probe = (
            "import ray, sys; ray.init(address=sys.argv[1], logging_level='ERROR', log_to_driver=False); "
            "print('alive', sum(n['Alive'] for n in ray.nodes()))"
        )
        head, end, said = self.nodes[0], time.monotonic() + START_SECONDS, ""
        # inside the head, whose files the driver of a Ray job reads
        pid = lambda: next((str(p.pid) for p in head.processes() if "ray" in " ".join(p.cmdline())), None)  # noqa: E731
        while time.monotonic() < end:
            command = [sys.executable, "-c", probe, f"{head.address}:{PORT}"]
            if self.isolated and (inside := pid()):
                command = ["nsenter", "--target", inside, "--mount", "--net", "--pid", "--uts", *command]
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
            if f"alive {number}\n" in done.stdout:
                return
            said = done.stdout[-500:] + done.stderr[-1500:]
            time.sleep(1)
        logs = "\n".join(f"{node.name}:\n{node.log()[-2000:]}" for node in self.nodes)
        raise AssertionError(f"not {number} Ray nodes within {START_SECONDS} s: {said}\n{logs}")

    def _connect(self) -> None:
        self._disconnect()
        for i in (1, 2):
            _ip("netns", "add", f"qerl-node{i}")
            hosts = Path(f"/etc/netns/qerl-node{i}/hosts")
            hosts.parent.mkdir(parents=True, exist_ok=True)
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 qerl-node{i}\n")
        _ip("link", "add", "eth1", "netns", "qerl-node1", "type", "veth", "peer", "name", "eth1", "netns", "qerl-node2")
        for i in (1, 2):
            _ip("-n", f"qerl-node{i}", "addr", "add", f"10.213.77.{i}/24", "dev", "eth1")
            _ip("-n", f"qerl-node{i}", "link", "set", "lo", "up")
            _attach(f"qerl-node{i}")

    def _disconnect(self) -> None:
        for i in (1, 2):
            subprocess.run(["ip", "netns", "del", f"qerl-node{i}"], capture_output=True)
            shutil.rmtree(f"/etc/netns/qerl-node{i}", ignore_errors=True)


def _attach(namespace: str) -> None:
    """Plugs the cable in. With a default route, as a host has: who asks for its address looks at
    that."""
    _ip("-n", namespace, "link", "set", "eth1", "up")
    _ip("-n", namespace, "route", "add", "default", "dev", "eth1")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
