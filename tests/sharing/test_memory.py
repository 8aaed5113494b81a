"""Tests the calls of CUDA's driver, with a driver that only records them."""

import ctypes
from types import SimpleNamespace

import pytest

from qerl_verl.sharing import memory
from qerl_verl.sharing.errors import SharingError

HANDLE = bytes(range(64))  # with a zero byte, at which a string would end


def test_a_handle_reaches_the_driver_by_value_and_whole(monkeypatch):
    seen = []

    def open_handle(place, handle, flags):
        seen.append((bytes(handle), flags))
        place[0] = 0x7F0000000000
        return 0

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_uint64), memory._IpcHandle, ctypes.c_uint)
    monkeypatch.setattr(memory, "_driver", lambda: SimpleNamespace(cuIpcOpenMemHandle_v2=kind(open_handle)))
    address, handle = ctypes.c_uint64(), memory._IpcHandle.from_buffer_copy(HANDLE)
    memory._check("cuIpcOpenMemHandle_v2", ctypes.byref(address), handle, ctypes.c_uint(1))
    assert seen == [(HANDLE, 1)] and address.value == 0x7F0000000000
    assert bytes.fromhex(bytes(handle).hex()) == HANDLE


def test_what_the_driver_refuses_is_told_in_its_own_words(monkeypatch):
    def tell(code, place):
        place[0] = b"operation not supported"
        return 0

    text = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_char_p))(tell)
    refuses = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)(lambda address: 801)
    driver = SimpleNamespace(cuIpcGetMemHandle=refuses, cuGetErrorString=text)
    monkeypatch.setattr(memory, "_driver", lambda: driver)
    with pytest.raises(SharingError, match=r"cuIpcGetMemHandle failed: operation not supported \(CUDA error 801\)"):
        memory._check("cuIpcGetMemHandle", ctypes.c_uint64(1))


def test_without_a_driver_the_reason_is_told():
    if memory.torch.cuda.is_available():
        pytest.skip("there is a driver")
    memory._driver.cache_clear()
    with pytest.raises(SharingError, match="driver library cannot be loaded: libcuda"):
        memory._driver()
