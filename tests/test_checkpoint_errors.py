"""Tests the messages for a full disk and for damaged files, with real errors of torch and
safetensors.
"""

import errno
import subprocess
import sys

import pytest
import torch

from qerl_verl.checkpoint_errors import reading, saved_ranks, writing
from qerl_verl.finite import NonFiniteError
from qerl_verl.nvfp4.errors import CheckpointError

FULL = """
import resource, signal, sys
import torch
from safetensors.torch import save_file
from qerl_verl.checkpoint_errors import writing
from qerl_verl.nvfp4.errors import CheckpointError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
tensors = {"a": torch.ones(10_000)}
save = {"torch": torch.save, "safetensors": save_file, "text": lambda t, f: open(f, "w").write("x" * 20_000)}[sys.argv[1]]
try:
    with writing(sys.argv[2], "actor, step 5"):
        save(tensors, sys.argv[2] + "/file")
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("writer", ["torch", "safetensors", "text"])
def test_a_file_that_cannot_grow(tmp_path, writer):
    result = subprocess.run(
        [sys.executable, "-c", FULL, writer, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.startswith(f"[qerl] actor, step 5: the checkpoint could not be written to {tmp_path} ("), (
        result
    )
    assert "GB are free there" in result.stdout and "start the same command again" in result.stdout


def test_other_errors_keep_their_name(tmp_path):
    with pytest.raises(RuntimeError, match="^CUDA out of memory$"), writing(str(tmp_path), "actor"):
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(NonFiniteError), writing(str(tmp_path), "actor"):
        raise NonFiniteError("a loss")


def save_ranks(folder, ranks):
    folder.mkdir(parents=True)
    for rank in range(ranks):
        torch.save({"a": torch.ones(1000)}, folder / f"model_world_size_{ranks}_rank_{rank}.pt")
    return folder


def load(folder, rank, ranks):
    with reading(str(folder), "actor", ranks):
        return torch.load(folder / f"model_world_size_{ranks}_rank_{rank}.pt", weights_only=False)


@pytest.mark.parametrize("left", [0, 3, 2000])
def test_a_damaged_file_names_the_folder_and_the_fix(tmp_path, left):
    folder = save_ranks(tmp_path / "global_step_7" / "actor", 1)
    file = folder / "model_world_size_1_rank_0.pt"
    file.write_bytes(file.read_bytes()[:left])
    fix = f"With {tmp_path / 'global_step_7'} moved out of .* goes on from the whole checkpoint before it"
    with pytest.raises(CheckpointError, match=f"actor: cannot resume from {folder} .*{fix}"):
        load(folder, 0, 1)


DOES_NOT_FIT = "Its files can be read and do not fit this run"
FILE_SYSTEM = "Start the same command again when it can"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), None),
        (MemoryError(), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), None),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), None),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp, remote process exited"), None),
        (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), None),
        (ModuleNotFoundError("No module named 'torchao'"), None),
        (AttributeError("Can't get attribute 'X' on module"), None),
        (PermissionError(errno.EACCES, "Permission denied", "{folder}/model_world_size_1_rank_0.pt"), "let this user"),
        (OSError(errno.EIO, "Input/output error"), FILE_SYSTEM),
        (OSError(errno.ESTALE, "Stale file handle"), FILE_SYSTEM),
        (OSError(errno.EMFILE, "Too many open files"), FILE_SYSTEM),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/another/library.so"), FILE_SYSTEM),
        (RuntimeError("Error(s) in loading state_dict for PeftModel: size mismatch for a.lora_A"), DOES_NOT_FIT),
        (ValueError("Failed to load LoRA-only checkpoint: unexpected keys ['a']"), DOES_NOT_FIT),
        (KeyError("base_model.model.a.lora_A.weight"), DOES_NOT_FIT),
    ],
)  # fmt: skip
def test_an_error_that_a_broken_file_does_not_explain_never_sends_the_checkpoint_away(tmp_path, error, advice):
    folder = save_ranks(tmp_path / "global_step_7" / "actor", 1)
    if error.args and "{folder}" in str(getattr(error, "filename", "")):
        error = type(error)(*error.args, str(folder / "model_world_size_1_rank_0.pt"))
    with pytest.raises(CheckpointError if advice else type(error)) as raised, reading(str(folder), "actor", 1):
        raise error
    text = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", ())])
    assert str(folder) in text and "moved" not in text and "elete" not in text
    assert (advice or "The checkpoint is not the cause and was not changed") in text


def test_a_missing_file_and_another_number_of_ranks(tmp_path):
    folder = save_ranks(tmp_path / "global_step_7" / "actor", 2)
    assert saved_ranks(folder) == [2] and load(folder, 1, 2)["a"].sum() == 1000
    with pytest.raises(CheckpointError, match="saved by 2 ranks and this run has 4.*Use 2 ranks.*lora_adapter_path="):
        load(folder, 3, 4)
    (folder / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(
        CheckpointError, match="FileNotFoundError.*put trainer.default_local_dir where all.*moved out of"
    ):
        load(folder, 1, 2)
    with pytest.raises(CheckpointError, match="FileNotFoundError.*does not share this folder"):
        load(tmp_path / "global_step_8" / "actor", 1, 2)
