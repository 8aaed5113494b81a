"""Tests which node is named when a run ends because a node is gone."""

from types import SimpleNamespace

import pytest
from ray._private import worker

from qerl_verl.platform import lost_nodes
from qerl_verl.platform.lost_nodes import NodeWatch, watch_nodes

CLOSED = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"
)


def node(number, alive=True):
    return {
        "NodeID": f"id{number}",
        "Alive": alive,
        "NodeManagerAddress": f"10.0.0.{number}",
        "NodeManagerHostname": f"node{number}",
        "DeathReasonMessage": "" if alive else "health check failed due\nto missing too many heartbeats",
    }


@pytest.fixture
def clock(monkeypatch):
    """Provides a clock that advances only while the watch sleeps. Threads of other tests keep
    theirs.
    """
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(lost_nodes, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


NAMED = ["node2 (10.0.0.2): health check failed due to missing too many heartbeats"]


@pytest.mark.parametrize(
    ("nodes", "error", "dead_after", "named", "waited"),
    [
        (2, CLOSED, 30, NAMED, 30),
        (2, CLOSED, None, [], lost_nodes.DETECTION_SECONDS),
        (2, RuntimeError("The actor is dead because its node has died"), 0, NAMED, 0),
        (2, ValueError("a bad value"), 30, [], 0),
        (1, CLOSED, None, [], 0),
    ],
)
def test_a_node_is_named_once_ray_knows_and_only_such_errors_wait(clock, nodes, error, dead_after, named, waited):
    before = [node(9, alive=False)]  # of an earlier run on the same cluster

    def list_nodes():
        dead = dead_after is not None and ended and clock[0] >= dead_after
        return before + [node(i, alive=not (dead and i == 2)) for i in range(1, nodes + 1)]

    ended, said = False, []
    watch = NodeWatch(list_nodes)
    watch.begin()
    ended = True
    assert watch.find_lost(error, said.append) == named
    assert clock[0] == waited and len(said) == (waited > 0)


def test_the_watch_begins_when_ray_is_up(monkeypatch):
    monkeypatch.setattr(worker, "_post_init_hooks", hooks := [])
    watch = watch_nodes()
    assert hooks == [watch.begin] and watch.began_with == set()
    monkeypatch.delattr(worker, "_post_init_hooks")
    assert watch_nodes() is None
