"""Implements ``qerl cluster --nodes N --gpus G``, which waits until a Ray cluster is complete.

The Slurm launcher runs it before training.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

POLL_SECONDS = 2.0
REMARK_SECONDS = 15.0


def add_cluster(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser(
        "cluster", parents=[common], help="wait until a Ray cluster has so many nodes and GPUs"
    )
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of all nodes together")
    parser.add_argument("--timeout", type=float, default=600, help="seconds (default: %(default)s)")
    parser.add_argument("--address", help="default: $RAY_ADDRESS, or the cluster on this machine")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    return wait_for_cluster(arguments.nodes, arguments.gpus, arguments.timeout, arguments.address)


def _ray_nodes(address: str | None) -> list[dict]:
    """Returns Ray's list of nodes. The first call joins the cluster."""
    import ray

    if not ray.is_initialized():
        ray.init(address=address or "auto", logging_level="ERROR", log_to_driver=False)
    return ray.nodes()


def wait_for_cluster(
    nodes: int,
    gpus: int,
    timeout: float,
    address: str | None = None,
    list_nodes: Callable[[str | None], list[dict]] = _ray_nodes,
) -> int:
    """Waits for a number of nodes and GPUs, and prints every 15 seconds how many there are.

    Args:
        nodes: number of nodes that must be alive.
        gpus: number of GPUs (Ray's resource of that name) that these nodes must have together.
        timeout: seconds after which it gives up.
        address: see ``ray.init``; None is ``RAY_ADDRESS`` or the cluster on this machine.
        list_nodes: takes the address and returns Ray's list of nodes.

    Returns:
        0, or 2 after the timeout; stderr then names what is missing.
    """
    started = time.monotonic()
    remark = REMARK_SECONDS
    while True:
        try:
            alive = [n for n in list_nodes(address) if n["Alive"]]
            found = int(sum(n["Resources"].get("GPU", 0) for n in alive))
            state = f"{len(alive)} of {nodes} nodes, {found} of {gpus} GPUs"
            if len(alive) >= nodes and found >= gpus:
                print(f"qerl: the Ray cluster is up: {state}", flush=True)
                return 0
        except (ConnectionError, RuntimeError) as error:
            alive, state = [], f"no Ray head answers yet ({' '.join(str(error).split())[:200]})"
        waited = time.monotonic() - started
        if waited >= timeout:
            break
        if waited >= remark:
            print(f"qerl: waiting for the Ray cluster, {waited:.0f} s: {state}", file=sys.stderr, flush=True)
            remark = waited + REMARK_SECONDS
        time.sleep(min(POLL_SECONDS, timeout))
    names = (
        ", ".join(f"{n.get('NodeManagerHostname')} ({int(n['Resources'].get('GPU', 0))} GPUs)" for n in alive) or "none"
    )
    print(
        f"qerl: the Ray cluster is not complete after {timeout:.0f} s: {state}. Nodes that "
        f"joined: {names}. Look at the output of `ray start` on the others: the port of the head "
        "may be blocked, or Python or Ray differ.",
        file=sys.stderr,
        flush=True,
    )
    return 2
