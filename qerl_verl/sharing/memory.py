"""Allocates a block of memory that a second process can map: main memory or GPU memory.

- Main memory is an anonymous file (memfd_create(2)). It has no name, so nothing remains after its
  processes; it does not count against the size of ``/dev/shm``; and it is freed with the last
  process that maps it. The other process receives its file descriptor.
- GPU memory comes from ``cuMemAlloc`` and is opened through CUDA IPC. It is not part of PyTorch's
  caching allocator: another process can open that allocator's expandable segments only with
  permission to trace this one (``pidfd_getfd``), and its reference counters are files in
  ``/dev/shm``. It is also outside the pools that vLLM puts to sleep. CUDA's driver API is called
  through ctypes, because PyTorch has no binding, and the driver's library has the same name on
  every host.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from functools import cache

import torch

from qerl_verl.sharing.errors import SharingError

HOST, CUDA = "host", "cuda"

_LAZY_PEER_ACCESS = 1
"""``CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS``, the only flag that ``cuIpcOpenMemHandle`` knows."""


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * 64)]  # CU_IPC_HANDLE_SIZE


@dataclass(frozen=True)
class Handle:
    """Data with which another process maps a block.

    Attributes:
        kind: ``host`` or ``cuda``.
        size: in bytes.
        device: identifier of the GPU (its UUID); empty for main memory.
        ipc: CUDA's handle in hexadecimal digits; empty for main memory, whose file descriptor is
            sent beside the handle.
    """

    kind: str
    size: int
    device: str = ""
    ipc: str = ""


class SharedMemory:
    """A block that other processes may map. It lives as long as this process.

    Attributes:
        data: ``[size]`` uint8, on the device; zero in main memory, undefined on a GPU.
        handle: handle for the other process.
        descriptor: descriptor of the anonymous file; None for GPU memory.
    """

    def __init__(self, data: torch.Tensor, handle: Handle, descriptor: int | None = None):
        self.data, self.handle, self.descriptor = data, handle, descriptor

    @classmethod
    def allocate(cls, size: int, device: torch.device) -> SharedMemory:
        """Allocates a new block of ``size`` bytes.

        Raises:
            SharingError: the device's memory cannot be shared.
            torch.OutOfMemoryError: the GPU has too little free memory.
        """
        return cls._on_gpu(size, device) if device.type == "cuda" else cls._on_host(size)

    @classmethod
    def _on_host(cls, size: int) -> SharedMemory:
        try:
            descriptor = os.memfd_create("qerl-base", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, size)
            return cls(_map_file(descriptor, size), Handle(HOST, size), descriptor)
        except (AttributeError, OSError) as error:  # not Linux, or no free memory
            raise SharingError(f"{size} bytes of main memory cannot be shared: {error}") from error

    @classmethod
    def _on_gpu(cls, size: int, device: torch.device) -> SharedMemory:
        address, handle = ctypes.c_uint64(), _IpcHandle()
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes CUDA's context current on this thread
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            if size > free:
                raise torch.OutOfMemoryError(
                    f"the shared base needs {size / 2**30:.2f} GiB of GPU memory in one block, {free / 2**30:.2f} are free"
                )
            _check("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
            try:
                _check("cuIpcGetMemHandle", ctypes.byref(handle), address)
            except SharingError:
                _check("cuMemFree_v2", address)
                raise
            return cls(_wrap(address.value, size), Handle(CUDA, size, gpu_identifier(device), bytes(handle).hex()))


def open_memory(handle: Handle, descriptor: int | None, device: torch.device) -> torch.Tensor:
    """Maps a block of another process.

    Args:
        handle: the block's handle.
        descriptor: descriptor of the anonymous file for main memory. It is closed here.
        device: where this process computes.

    Returns:
        ``[size]`` uint8, the same bytes. The mapping lasts as long as the tensor's storage.

    Raises:
        SharingError: this process cannot map the block.
    """
    if handle.kind == HOST:
        if descriptor is None:
            raise SharingError("the file descriptor of the shared memory did not arrive")
        try:
            return _map_file(descriptor, handle.size)
        except OSError as error:
            raise SharingError(f"the shared memory cannot be mapped: {error}") from error
        finally:
            os.close(descriptor)
    if device.type != "cuda" or gpu_identifier(device) != handle.device:
        here = gpu_identifier(device) if device.type == "cuda" else device.type
        raise SharingError(f"the base lies on GPU {handle.device}, this process computes on {here}")
    address = ctypes.c_uint64()
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        given = _IpcHandle.from_buffer_copy(bytes.fromhex(handle.ipc))
        _check("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return _wrap(address.value, handle.size)


def gpu_identifier(device: torch.device) -> str:
    """Returns the GPU's UUID, which does not depend on ``CUDA_VISIBLE_DEVICES``."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _map_file(descriptor: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


class _Address:
    """Exposes device memory to ``torch.as_tensor`` (``__cuda_array_interface__``, version 2)."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


def _wrap(address: int, size: int) -> torch.Tensor:
    """Returns device memory as a ``[size]`` uint8 tensor.

    The memory is not freed or closed before the process ends, because CUDA graphs and other tensors
    hold its address.
    """
    return torch.as_tensor(_Address(address, size), device=torch.device("cuda", torch.cuda.current_device()))


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise SharingError(f"CUDA's driver library cannot be loaded: {error}") from error


def _check(function: str, *arguments) -> None:
    """Calls a function of CUDA's driver.

    Raises:
        SharingError: the call failed; has the driver's own text.
    """
    result = getattr(_driver(), function)(*arguments)
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        reason = (text.value or b"unknown").decode(errors="replace")
        raise SharingError(f"{function.removesuffix('_v2')} failed: {reason} (CUDA error {result})")
