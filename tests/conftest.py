"""Provides fixtures of several test folders, and divides the tests among pytest-xdist's workers."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import pytest
import torch
from transformers import Qwen2ForCausalLM

from tests.helpers.tiny_model import make_model

ONE_THREAD = "QERL_TEST_ONE_THREAD"
"""Set by tests that start pytest beside other workers."""

if {"PYTEST_XDIST_WORKER", ONE_THREAD} & os.environ.keys():
    # OMP_NUM_THREADS=1 is not used, because a vLLM engine would inherit it: vLLM 0.28 corrupts its
    # heap on one thread when a batch mixes prefill and decoding.
    torch.set_num_threads(1)

ALONE = ("integration", "engine")
"""Marks of tests that start Ray or a vLLM engine. They need up to 10 GB, so one worker runs all of
them, one after the other."""

ALONE_PLACES = (
    "tests/integration/",
    "tests/rollout/test_live_engine.py",
    "tests/rollout/test_families.py",
    "tests/rollout/test_shared_families.py",
    "tests/evaluation/test_live_evaluation.py",
)
"""Where such tests are: folders, and files with their names."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Gives each file to one worker, because of its fixtures, and tests that run alone to one
    worker.

    pytest-xdist 3.8 marks groups in a private field that pytest 9.2 does not read, so
    ``--dist loadgroup`` divides nothing there. The files are recognised by their names.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "alone" if nodeid.startswith(ALONE_PLACES) else nodeid.partition("::")[0]

    return Scheduler(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Starts tests that run alone first, because they take longest.

    ``--no-loadscope-reorder`` keeps this order.

    Raises:
        pytest.UsageError: a test that starts Ray or an engine is outside :data:`ALONE_PLACES`.
    """
    for item in items:
        if any(item.get_closest_marker(mark) for mark in ALONE) and not item.nodeid.startswith(ALONE_PLACES):
            raise pytest.UsageError(f"{item.nodeid} is marked as one of {ALONE}, but lies outside {ALONE_PLACES}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not item.nodeid.startswith(ALONE_PLACES))
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def model_factory():
    """Provides :func:`~tests.helpers.tiny_model.make_model`, for tests that need another shape."""
    return make_model


@pytest.fixture(scope="session")
def bf16_checkpoint(tmp_path_factory) -> Path:
    """Returns a tiny 16-bit checkpoint."""
    return make_model(tmp_path_factory.mktemp("bf16"))


@pytest.fixture(scope="session")
def nvfp4_checkpoint(tmp_path_factory, bf16_checkpoint) -> Path:
    """Returns :func:`bf16_checkpoint`, quantized."""
    from qerl_verl.nvfp4.quantize import quantize_checkpoint

    folder = tmp_path_factory.mktemp("nvfp4") / "model"
    quantize_checkpoint(bf16_checkpoint, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def dequantized_checkpoint(tmp_path_factory, nvfp4_checkpoint, bf16_checkpoint) -> Path:
    """Returns the quantized model as a plain float32 checkpoint, for stock readers."""
    from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
    from qerl_verl.nvfp4.loading import iterate_tensors

    tensors = dict(iterate_tensors(nvfp4_checkpoint))
    model = Qwen2ForCausalLM.from_pretrained(bf16_checkpoint, dtype=torch.float32)
    state = model.state_dict()
    for name in state:
        base = name.removesuffix(".weight")
        if f"{base}.weight_packed" in tensors:
            parts = (tensors[f"{base}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale"))
            state[name] = dequantize_nvfp4(*parts, dtype=torch.float32)
    model.load_state_dict(state)
    folder = tmp_path_factory.mktemp("dequantized")
    model.save_pretrained(folder)
    from qerl_verl.quickstart.tiny_model import build_tokenizer

    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_prompts():
    """Returns ``write_prompts(file, rows)``, which writes a parquet file of arithmetic prompts.

    The file has the columns that verl reads.
    """
    import pyarrow as pa
    from pyarrow import parquet

    def write(file: Path, rows: int, **columns: list | None) -> Path:
        content = {
            "prompt": [[{"role": "user", "content": f"{i} + {i} ="}] for i in range(rows)],
            "data_source": ["arithmetic"] * rows,
            "reward_model": [{"ground_truth": str(2 * i)} for i in range(rows)],
            **columns,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({name: values for name, values in content.items() if values is not None}), file)
        return file

    return write


@pytest.fixture
def gsm8k_files(tmp_path, monkeypatch, write_prompts) -> Path:
    """Returns a working directory with the data of QeRL's recipes, as few rows as GSM8K's recipes
    take.
    """
    write_prompts(tmp_path / "data/gsm8k/train.parquet", 1024)
    write_prompts(tmp_path / "data/gsm8k/test.parquet", 8)
    monkeypatch.chdir(tmp_path)
    return tmp_path
