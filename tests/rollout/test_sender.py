"""Tests that the sender of weights has a socket that no other job on the host has."""

import types

import pytest
import ray
from verl.workers.rollout.base import get_rollout_class
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension
from verl.workers.rollout.vllm_rollout.vllm_rollout import ServerAdapter

from qerl_verl.rollout import sender
from qerl_verl.rollout.register import register_sender
from qerl_verl.rollout.sender import QeRLServerAdapter, job_name

FIRST_JOB = "01000000"


def in_cluster(monkeypatch, session, job=FIRST_JOB):
    context = types.SimpleNamespace(get_job_id=lambda: job, get_session_name=lambda: session)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)


def verls_name(self, *args, **kwargs):
    """Returns the name of ServerAdapter.__init__ without an engine."""
    self.zmq_handle = f"ipc:///tmp/rl-colocate-zmq-{ray.get_runtime_context().get_job_id()}-replica-0-rank-1.sock"


def test_jobs_of_two_clusters_have_sockets_of_their_own(monkeypatch):
    monkeypatch.setattr(ServerAdapter, "__init__", verls_name)
    handles = set()
    for session, job in (("session_a", FIRST_JOB), ("session_b", FIRST_JOB), ("session_a", "02000000")):
        in_cluster(monkeypatch, session, job)
        handles.add(QeRLServerAdapter().zmq_handle)
    assert len(handles) == 3
    # a socket's path holds 107 bytes
    assert all(len(handle.removeprefix("ipc://")) < 100 for handle in handles)


def test_sender_and_engine_name_the_same_socket(monkeypatch):
    monkeypatch.setattr(ServerAdapter, "__init__", verls_name)
    in_cluster(monkeypatch, "session_2026-01-01_00-00-00_000000_1")
    # QeRLHttpServer does, for its engine's workers
    monkeypatch.setenv("VERL_RAY_JOB_ID", job_name())
    monkeypatch.setenv("VERL_REPLICA_RANK", "0")
    worker = types.SimpleNamespace(local_rank=1, model_runner=None)
    assert vLLMColocateWorkerExtension._get_zmq_handle(worker) == QeRLServerAdapter().zmq_handle


def test_another_way_to_name_it_is_refused(monkeypatch):
    monkeypatch.setattr(
        ServerAdapter, "__init__", lambda self: setattr(self, "zmq_handle", "ipc:///tmp/rl-colocate-zmq-replica-0.sock")
    )
    in_cluster(monkeypatch, "session_a")
    with pytest.raises(RuntimeError, match="without the job's id"):
        QeRLServerAdapter()


def test_verl_finds_it_in_its_table():
    register_sender()
    assert get_rollout_class("vllm") is sender.QeRLServerAdapter
