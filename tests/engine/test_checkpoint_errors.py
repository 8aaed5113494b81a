"""What a full disk and damaged files look like: torch's and safetensors' real errors, with folder and cure."""

import subprocess
import sys

import pytest
import torch

from qerl_verl.engine.checkpoint_errors import reading, saved_ranks, writing
from qerl_verl.engine.finite import NonFiniteError
from qerl_verl.nvfp4.errors import CheckpointError

FULL = """
import resource, signal, sys
import torch
from safetensors.torch import save_file
from qerl_verl.engine.checkpoint_errors import writing
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
def test_a_damaged_file_names_the_folder_and_the_cure(tmp_path, left):
    folder = save_ranks(tmp_path / "global_step_7" / "actor", 1)
    file = folder / "model_world_size_1_rank_0.pt"
    file.write_bytes(file.read_bytes()[:left])
    cure = f"Delete or move {tmp_path / 'global_step_7'}: .* goes on from the whole checkpoint before it"
    with pytest.raises(CheckpointError, match=f"actor: cannot resume from {folder} .*{cure}"):
        load(folder, 0, 1)


def test_a_missing_file_and_another_number_of_ranks(tmp_path):
    folder = save_ranks(tmp_path / "global_step_7" / "actor", 2)
    assert saved_ranks(folder) == [2] and load(folder, 1, 2)["a"].sum() == 1000
    with pytest.raises(
        CheckpointError, match="was saved by 2 ranks and this run has 4.*Use 2 ranks.*lora_adapter_path="
    ):
        load(folder, 3, 4)
    (folder / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(CheckpointError, match="cannot resume from .*FileNotFoundError"):
        load(folder, 1, 2)
