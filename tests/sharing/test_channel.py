"""Tests a block of memory in two real processes: the same bytes, and nothing left when either
ends."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from qerl_verl.sharing import channel
from qerl_verl.sharing.channel import BaseOwner, SharedBase, address
from qerl_verl.sharing.errors import SharingError
from qerl_verl.sharing.layout import Layout, LayoutBuilder
from qerl_verl.sharing.memory import Handle, SharedMemory, open_memory

CPU = torch.device("cpu")
SIZE = 8 << 20


@pytest.fixture
def key():
    return os.urandom(16).hex()


def layout_of(size: int) -> Layout:
    return Layout(size, (), {})


def own(key: str, ready) -> None:
    """Runs the owner's process on one thread.

    OpenMP's threads of the process that it was forked from do not exist in it, and a second thread
    would wait for them for ever.
    """
    torch.set_num_threads(1)
    memory = SharedMemory.allocate(SIZE, CPU)
    memory.data.copy_(torch.arange(SIZE).remainder(251).to(torch.uint8))
    BaseOwner((memory, layout_of(SIZE)), key, 3)
    ready.set()
    time.sleep(60)


@pytest.fixture
def owner(key):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=own, args=(key, ready), daemon=True)
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_another_process_sees_the_owners_bytes_and_writes_into_them(owner, key):
    base, again = (SharedBase.connect(key, 3, CPU) for _ in range(2))
    assert base.layout == layout_of(SIZE)
    assert torch.equal(base.data, torch.arange(SIZE).remainder(251).to(torch.uint8))
    base.data[5] = 77
    assert again.data[5] == 77


def test_nothing_of_the_memory_has_a_name(owner, key):
    before = set(os.listdir("/dev/shm"))
    base = SharedBase.connect(key, 3, CPU)
    assert set(os.listdir("/dev/shm")) == before
    maps = Path("/proc/self/maps").read_text()
    assert base.data.numel() == SIZE and "/memfd:qerl-base (deleted)" in maps


def test_two_processes_hold_the_bytes_once(owner, key):
    base = SharedBase.connect(key, 3, CPU)
    base.data.sum()
    mine = next(m for m in psutil.Process().memory_maps(grouped=False) if "qerl-base" in m.path)
    assert mine.rss >= SIZE and mine.pss <= 0.6 * SIZE


def test_the_end_of_the_owner_is_noticed_and_the_bytes_stay_until_then(owner, key):
    base, ended = SharedBase.connect(key, 3, CPU), threading.Event()
    base.watch(ended.set, grace_s=0.2)
    assert not ended.wait(0.5)
    os.kill(owner.pid, signal.SIGKILL)
    assert ended.wait(5) and base.data[250] == 250


def test_a_process_whose_owner_is_gone_ends_with_a_line(owner, key):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        SharedBase.connect(key, 3, CPU).watch(grace_s=0.1)
        os.write(write, b"watching\n")
        time.sleep(30)
        os._exit(0)
    os.close(write)
    lines = os.fdopen(read)
    assert lines.readline() == "watching\n"
    os.kill(owner.pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert f"the process that owns the base is gone, so this one ({child}) ends" in lines.read()


def test_who_does_not_know_the_key_gets_nothing(owner, key):
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.settimeout(10)
    stranger.connect(address(key, 3))
    stranger.sendall(b"0" * len(key))
    try:
        assert stranger.recv(1) == b""
    except ConnectionResetError:
        pass
    assert key not in address(key, 3)


def test_another_users_process_gets_nothing(key, monkeypatch):
    memory = SharedMemory.allocate(SIZE, CPU)
    server = BaseOwner((memory, layout_of(SIZE)), key, 0)
    monkeypatch.setattr(channel.os, "getuid", lambda: 12345)
    with pytest.raises(SharingError, match="did not hand it over"):
        SharedBase.connect(key, 0, CPU)
    server.close()


def test_without_an_owner_the_rank_is_named(key):
    with pytest.raises(SharingError, match="no process on this host owns the base of rank 1"):
        SharedBase.connect(key, 1, CPU, timeout_s=0.1)


def test_an_owner_that_shares_nothing_says_why(key):
    server = BaseOwner("the rollout computes with marlin", key, 0)
    with pytest.raises(SharingError, match="^the rollout computes with marlin$"):
        SharedBase.connect(key, 0, CPU)
    with pytest.raises(SharingError, match="cannot listen"):
        BaseOwner("again", key, 0)
    server.close()


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        (Handle("host", 16), "file descriptor .* did not arrive"),
        (Handle("cuda", 16, "GPU-1", "00" * 64), "the base lies on GPU GPU-1, this process computes on cpu"),
    ],
)
def test_memory_that_cannot_be_mapped_is_told(handle, message):
    with pytest.raises(SharingError, match=message):
        open_memory(handle, None, CPU)


def test_regions_do_not_overlap_and_are_aligned():
    builder = LayoutBuilder()
    builder.add_group(["q", "k"], [48, 16], 32, "pytorch")
    builder.add_tensor("embed", torch.empty(5, 3, dtype=torch.bfloat16), True, 64)
    builder.add_tensor("norm", torch.empty(7), False)
    layout = builder.build()
    group, embed, norm = layout.groups[0], layout.tensors["embed"], layout.tensors["norm"]
    assert (group.packed, group.scale, embed.offset, norm.offset, layout.size) == (0, 1024, 1536, 2048, 2560)
    data = torch.zeros(layout.size, dtype=torch.uint8)
    packed, scale = group.views(data)
    assert packed.shape == (64, 16) and scale.shape == (64, 2)
    assert group.views(data, "k")[0].data_ptr() == packed[48:].data_ptr()
    assert embed.view(data).shape == (5, 3) and embed.view(data, 64).shape == (64, 3)
    assert layout.shared_bytes() == 64 * 16 + 64 * 2 + 64 * 3 * 2
