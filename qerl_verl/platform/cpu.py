"""Provides the platform ``cpu`` for verl, with everything on the host and collectives through gloo
(interface: verl/plugin/platform/platform_base.py).

verl places workers by an accelerator resource of Ray's. On this platform a "GPU" is a slot for a
training worker and its rollout engine: the switch declares as many slots to Ray as the run asks
for.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase


class _CPUDeviceModule(ModuleType):
    """Extends ``torch.cpu`` by the memory and random-state functions of ``torch.cuda`` that verl
    calls.
    """

    def __init__(self):
        super().__init__("qerl_verl.platform.cpu.device")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def set_device(device) -> None:
        pass

    @staticmethod
    def get_device_name(device=None) -> str:
        return "CPU"  # a key of verl/utils/flops_counter.py

    @staticmethod
    def empty_cache() -> None:
        pass

    @staticmethod
    def ipc_collect() -> None:
        pass

    @staticmethod
    def reset_peak_memory_stats(device=None) -> None:
        pass

    @staticmethod
    def memory_allocated(device=None) -> int:
        return _resident_bytes()

    @staticmethod
    def memory_reserved(device=None) -> int:
        return _resident_bytes()

    @staticmethod
    def max_memory_allocated(device=None) -> int:
        return _peak_resident_bytes()

    @staticmethod
    def max_memory_reserved(device=None) -> int:
        return _peak_resident_bytes()

    @staticmethod
    def mem_get_info(device=None) -> tuple[int, int]:
        import psutil

        memory = psutil.virtual_memory()
        return memory.available, memory.total

    @staticmethod
    def get_rng_state(device=None) -> torch.Tensor:
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state, device=None) -> None:
        torch.set_rng_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.manual_seed(seed)

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        torch.manual_seed(seed)


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _peak_resident_bytes() -> int:
    import resource

    # the kernel updates ru_maxrss later than the resident size
    return max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, _resident_bytes())


def _interface_between_nodes() -> str | None:
    """Returns the network interface that has the node's address in the Ray cluster, if the ranks
    are on several nodes.

    gloo uses the address that the host's own name resolves to. On many hosts this is a loopback
    address (Debian's 127.0.1.1), to which other nodes cannot connect. Returns None for a single
    node, if the user has set ``GLOO_SOCKET_IFNAME``, or if no interface has the address.
    """
    world = os.environ["WORLD_SIZE"]
    if os.environ.get("RAY_LOCAL_WORLD_SIZE", world) == world or "GLOO_SOCKET_IFNAME" in os.environ:
        return None
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    return next((name for name, found in psutil.net_if_addrs().items() if address in {a.address for a in found}), None)


class PlatformCPU(PlatformBase):
    """Presents the host as verl's accelerator. Chosen by ``VERL_PLATFORM=cpu`` only, never
    detected.
    """

    _device_module = _CPUDeviceModule()

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return self._device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check=False) -> bool:
        return False

    def current_device(self) -> torch.device:
        # verl passes this to Tensor.to() and to device_map-like arguments, where an index would
        # mean an accelerator
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        """Initializes the process group and returns ``gloo``.

        verl builds ``f"cpu:gloo,{device}:{backend}"`` (verl/utils/distributed.py,
        initialize_global_process_group_ray). Here that is ``cpu:gloo,cpu:gloo``, which torch
        rejects, but verl calls ``init_process_group`` with it only if there is no group yet.
        """
        if "WORLD_SIZE" in os.environ and "RANK" in os.environ and not torch.distributed.is_initialized():
            if interface := _interface_between_nodes():
                os.environ["GLOO_SOCKET_IFNAME"] = interface
            torch.distributed.init_process_group(
                backend="gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD", None),
            )
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None
