"""Tests the message about what a run waits for."""

import pytest
import ray

from qerl_verl.platform import waiting


def group(state, bundles=2, strategy="STRICT_PACK"):
    content = {i: {"CPU": 3.0, "GPU": 1.0} for i in range(bundles)}
    return {"name": "global_poolverl_group_2:0", "state": state, "strategy": strategy, "bundles": content}


@pytest.mark.parametrize(
    ("total", "free", "groups", "expected"),
    [
        ({"GPU": 2, "CPU": 16}, {"GPU": 2, "CPU": 16}, [], ""),
        ({"GPU": 2, "CPU": 16}, {"CPU": 1}, [group("CREATED"), group("REMOVED")], ""),
        ({"GPU": 2, "CPU": 8}, {"CPU": 1}, [], "the run reserves 16 CPUs and the cluster has 8; `ray status`"),
        ({"CPU": 8}, {}, [], "the run reserves 2 GPUs and the cluster has 0, 16 CPUs and the cluster has 8"),
        ({"GPU": 2, "CPU": 16}, {"GPU": 1, "CPU": 9}, [group("PENDING")],
         "2 times 3 CPU and 1 GPU on one node (global_poolverl_group_2:0); free in the cluster are 1 of 2 GPUs, 9 of 16 CPUs"),
        ({"GPU": 2, "CPU": 16}, {"CPU": 9}, [group("PENDING", 1)], "1 times 3 CPU and 1 GPU (global"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(total, free, groups, expected):
    line = waiting.describe(2, 16, total, free, groups)
    assert expected in line and bool(line) is bool(expected)


def test_a_line_comes_when_it_waits_longer_than_a_look_and_the_watch_ends_when_all_is_placed(monkeypatch):
    looks = iter([[group("PENDING")], [group("CREATED")], [group("PENDING")], [group("PENDING")], [], []])
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "SETTLED_LOOKS", 2)
    monkeypatch.setattr(waiting, "_groups", lambda: next(looks))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for name in ("cluster_resources", "available_resources"):
        monkeypatch.setattr(ray, name, lambda: {"GPU": 2, "CPU": 16})
    lines = []
    waiting.start_watch(2, 16, lines.append).join(10)
    assert len(lines) == 1 and lines[0].startswith("waiting for resources: 2 times 3 CPU") and not list(looks)


def test_the_watch_ends_with_the_process(monkeypatch):
    """It also ends before Ray is up. Ray's own end comes later, and must not meet a look."""
    ends = []
    monkeypatch.setattr(waiting.atexit, "register", lambda *call: ends.append(call))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    thread = waiting.start_watch(1, 1, lambda line: None)
    ((end, *arguments),) = ends
    end(*arguments)
    assert not thread.is_alive()
