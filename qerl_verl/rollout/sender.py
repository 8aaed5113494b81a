"""Gives verl's colocated sender of weights a socket that belongs to this job alone.

verl names the Unix socket between an actor and its engine after Ray's job id (vllm_rollout.py,
ServerAdapter, and utils.py, _get_zmq_handle). In a cluster that a driver starts for itself that id
is always the first one, 01000000. Two runs on one host would share the path: the one that binds
last receives the other's adapter, or both wait for ever. Here the name also contains the cluster's
session.
"""

from __future__ import annotations

import hashlib

import ray
from verl.workers.rollout.vllm_rollout import ServerAdapter


def job_name() -> str:
    """Returns a name of this Ray job that differs from those of all other jobs on this host."""
    context = ray.get_runtime_context()
    session = hashlib.blake2b(context.get_session_name().encode(), digest_size=6).hexdigest()
    return f"{context.get_job_id()}-{session}"


class QeRLServerAdapter(ServerAdapter):
    """verl's sender, registered in its table of rollout classes under ``vllm``.

    The engine's side is :class:`qerl_verl.rollout.server.QeRLHttpServer`, which passes
    :func:`job_name` to its workers.

    Raises:
        RuntimeError: verl does not name the socket as expected here.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        job = ray.get_runtime_context().get_job_id()
        if f"-{job}-" not in self.zmq_handle:
            raise RuntimeError(
                f"verl's socket for weights is named {self.zmq_handle}, without the job's id: this "
                "version of verl does not fit; `qerl doctor` lists the versions that do"
            )
        self.zmq_handle = self.zmq_handle.replace(f"-{job}-", f"-{job_name()}-", 1)
