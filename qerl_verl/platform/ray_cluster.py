"""Finds out whether a run joins a running Ray cluster or starts Ray itself.

The choice of the platform, the job's folder for temporary files and the resources that the switch
declares to Ray all depend on the answer of :func:`find_cluster`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

RAY_INIT = "ray_kwargs.ray_init"


@dataclass(frozen=True)
class RayCluster:
    """A Ray cluster that ``ray.init`` will join.

    Attributes:
        address: ``host:port`` of its GCS, or ``ray://host:port`` for Ray's client.
        found_by: where Ray finds the address: a setting, ``RAY_ADDRESS``, or the file of a ``ray
            start``.
    """

    address: str
    found_by: str


def find_cluster(ray_init: Mapping, environment: Mapping[str, str] = os.environ) -> RayCluster | None:
    """Returns the cluster that ``ray.init(**ray_init)`` joins, None where it starts one on this
    machine.

    Follows ``ray/_private/services.py``, ``canonicalize_bootstrap_address``: an address in the
    call, unless it is ``auto``; then ``RAY_ADDRESS``; then the file that ``ray start`` writes
    beside Ray's sessions.

    Args:
        ray_init: verl's ``ray_kwargs.ray_init``.
        environment: the driver's environment variables.
    """
    from ray._private.services import find_bootstrap_address, find_gcs_addresses

    address, variable = ray_init.get("address"), environment.get("RAY_ADDRESS")
    if address in (None, "", "auto") and variable:
        address, found_by = variable, "RAY_ADDRESS"
    else:
        found_by = f"{RAY_INIT}.address"
    if address == "local":
        return None
    if address not in (None, "", "auto"):
        return RayCluster(address, found_by)
    if started := find_bootstrap_address(ray_init.get("_temp_dir")):
        return RayCluster(started, "a Ray that runs on this machine")
    if address == "auto":
        running = find_gcs_addresses()
        return (
            RayCluster(next(iter(running)), "a Ray that runs on this machine")
            if running
            else RayCluster("auto", found_by)
        )
    return None


def answers(address: str, seconds: float = 5.0) -> bool:
    """Returns whether a process listens at an address of :class:`RayCluster`. After a crash of Ray,
    its file still names an address at which none does.
    """
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if not port.isdigit():
        return address != "auto"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
            return True
    except OSError:
        return False
