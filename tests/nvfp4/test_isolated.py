"""Tests that quantizing in a process of its own has the same results and errors."""

import os
import threading

import pytest

from qerl_verl.nvfp4 import isolated
from qerl_verl.nvfp4.cache import Quantization, resolve_checkpoint
from qerl_verl.nvfp4.calibration import Calibration
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.quantize import quantize_checkpoint


def text(folder):
    return Calibration((((5, 6, 7, 8), 1), ((9, 10, 11), 0)), (((4, 3, 2), 0),), "a test")


def test_the_same_checkpoint(make_checkpoint, tmp_path, monkeypatch):
    src, how = make_checkpoint(), Quantization("gptq", text, device="cpu", isolated=True)
    quantize_checkpoint(src, tmp_path / "here", method="gptq", calibration=text(src), device="cpu", progress=False)
    there = resolve_checkpoint(src, tmp_path / "cache", how, progress=False).path
    for file in (tmp_path / "here").iterdir():
        assert file.read_bytes() == (there / file.name).read_bytes()
    monkeypatch.setattr(isolated.subprocess, "run", None)  # the second time there is nothing to do
    assert resolve_checkpoint(src, tmp_path / "cache", how, progress=False).path == there


def test_its_errors_are_raised_here(make_checkpoint, tmp_path, monkeypatch):
    arguments = dict(method="rtn", calibration=None, device="cpu", progress=False)
    monkeypatch.setattr(isolated.sys, "executable", "false")
    with pytest.raises(CheckpointError, match="ended with code 1"):
        isolated.quantize_in_a_process(make_checkpoint(), tmp_path / "dst", **arguments)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        isolated.quantize_in_a_process(tmp_path / "nowhere", tmp_path / "dst", **arguments)


def test_it_ends_when_nobody_waits_any_more():
    left = []
    isolated._end_with(os.getppid() + 1, left.append, 0.01)  # stands for a parent that has died
    assert left == [1]
    left.clear()
    waiting = threading.Thread(target=isolated._end_with, args=(os.getppid(), left.append, 0.01), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and not left
