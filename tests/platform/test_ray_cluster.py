"""Tests that the check whether a run joins a Ray cluster agrees with ray.init."""

import inspect
import socket

import pytest
from ray._private import services

from qerl_verl.platform.ray_cluster import answers, find_cluster

RUNNING = "a Ray that runs on this machine"


@pytest.mark.parametrize(
    ("address", "variable", "started", "running", "expected"),
    [
        (None, None, None, (), None),
        (None, None, "1.1.1.1:6379", (), ("1.1.1.1:6379", RUNNING)),  # `ray start` on this machine
        (None, None, None, ("2.2.2.2:1",), None),  # another run's own Ray: ray.init starts one too
        (None, "", "1.1.1.1:6379", (), ("1.1.1.1:6379", RUNNING)),
        (None, "3.3.3.3:6379", "1.1.1.1:6379", (), ("3.3.3.3:6379", "RAY_ADDRESS")),
        (None, "local", "1.1.1.1:6379", (), None),
        ("local", "3.3.3.3:6379", "1.1.1.1:6379", (), None),
        ("auto", "3.3.3.3:6379", None, (), ("3.3.3.3:6379", "RAY_ADDRESS")),
        ("auto", None, "1.1.1.1:6379", (), ("1.1.1.1:6379", RUNNING)),
        ("auto", None, None, ("2.2.2.2:1",), ("2.2.2.2:1", RUNNING)),
        ("auto", None, None, (), ("auto", "ray_kwargs.ray_init.address")),
        ("4.4.4.4:6379", "3.3.3.3:6379", None, (), ("4.4.4.4:6379", "ray_kwargs.ray_init.address")),
        ("ray://4.4.4.4:10001", None, None, (), ("ray://4.4.4.4:10001", "ray_kwargs.ray_init.address")),
    ],
)
def test_the_cluster_that_ray_would_join(monkeypatch, address, variable, started, running, expected):
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: started)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: set(running))
    environment = {} if variable is None else {"RAY_ADDRESS": variable}
    found = find_cluster({"address": address}, environment)
    assert (found and (found.address, found.found_by)) == expected

    # the same question, put to Ray itself
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    if address is None or "://" not in address:
        try:
            joined = services.canonicalize_bootstrap_address(
                variable if variable and address in (None, "auto") else address, None
            )
        except ConnectionError:  # "auto", and none runs
            joined = "auto"
        assert joined == (found and found.address)


def test_the_file_of_ray_start_is_looked_for_where_rays_folder_is(tmp_path):
    (tmp_path / "ray_current_cluster").write_text("5.5.5.5:6379\n")
    assert find_cluster({"_temp_dir": str(tmp_path)}, {}).address == "5.5.5.5:6379"


def test_who_answers():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert (
            answers(f"127.0.0.1:{port}") and answers(f"ray://127.0.0.1:{port}") and answers(f"ray://127.0.0.1:{port}/x")
        )
    assert not answers(f"127.0.0.1:{port}") and not answers("auto")


def test_nothing_else_asks_whether_a_cluster_is_joined():
    """Platform, job folder and declared resources follow from the plan's one answer."""
    from qerl_verl.config import callback, host, rules

    for module in (callback, host, rules):
        assert 'get("RAY_ADDRESS")' not in inspect.getsource(module)
