"""Tests the CPU platform against verl's interface and verl's calls of it."""

import inspect
import re
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import ray
import torch
import verl
from verl.plugin.platform.platform_base import PlatformBase

from qerl_verl.platform import cpu
from qerl_verl.platform.cpu import PlatformCPU


def test_implements_the_whole_interface():
    platform = PlatformCPU()
    assert not PlatformCPU.__abstractmethods__
    assert platform.device_name == "cpu" and platform.ray_resource_name() == "GPU"
    assert isinstance(platform, PlatformBase) and platform.is_available()


def test_is_never_detected_only_named():
    assert not PlatformCPU().is_platform_available(use_smi_check=True)


def test_current_device_is_one_that_tensors_move_to():
    assert torch.zeros(1).to(PlatformCPU().current_device()).device.type == "cpu"


def test_the_device_module_has_every_function_that_verl_calls_on_it():
    """Fails when verl starts to call another function. Functions of accelerators are excluded:
    streams, events, memory limits.
    """
    source = "".join(p.read_text() for p in Path(verl.__file__).parent.rglob("*.py"))
    called = set(re.findall(r"get_torch_device\(\)\.(\w+)", source))
    called -= {"Event", "set_per_process_memory_fraction"}
    assert {"empty_cache", "get_rng_state", "mem_get_info", "get_device_name"} <= called
    module = PlatformCPU().device_module
    missing = {name for name in called if not hasattr(module, name)}
    assert not missing


def test_memory_numbers_are_this_processes_own():
    module = PlatformCPU().device_module
    assert 0 < module.memory_allocated() <= module.max_memory_allocated()
    free, total = module.mem_get_info()
    assert 0 < free <= total


def test_random_state_goes_round():
    module = PlatformCPU().device_module
    state = module.get_rng_state()
    first = torch.rand(3)
    module.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def test_verl_still_names_the_backend_the_way_that_the_platform_works_around():
    from verl.utils.distributed import initialize_global_process_group_ray

    source = inspect.getsource(initialize_global_process_group_ray)
    assert "cpu:gloo,{get_device_name()}:{get_nccl_backend()}" in source
    assert source.index("get_nccl_backend()") < source.index("if not torch.distributed.is_initialized()")


@pytest.mark.parametrize(
    ("variables", "address", "interface"),
    [
        ({"WORLD_SIZE": "2", "RAY_LOCAL_WORLD_SIZE": "2"}, "10.0.0.2", None),
        ({"WORLD_SIZE": "2"}, "10.0.0.2", None),
        ({"WORLD_SIZE": "2", "RAY_LOCAL_WORLD_SIZE": "1"}, "10.0.0.2", "eth7"),
        ({"WORLD_SIZE": "2", "RAY_LOCAL_WORLD_SIZE": "1"}, "192.168.0.9", None),
        ({"WORLD_SIZE": "2", "RAY_LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "ib0"}, "10.0.0.2", None),
    ],
)
def test_ranks_on_several_nodes_use_the_interface_of_the_cluster(monkeypatch, variables, address, interface):
    for name in ("WORLD_SIZE", "RAY_LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    Address = namedtuple("Address", "address")
    found = {"lo": [Address("127.0.0.1")], "eth7": [Address("fe80::1"), Address("10.0.0.2")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    assert cpu._interface_between_nodes() == interface
