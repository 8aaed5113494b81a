"""Names, reads, copies and writes the files of a Hugging Face checkpoint."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

from qerl_verl.nvfp4.architectures import UnsupportedArchitecture, get_architecture
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.safetensors_stream import FileRecord, HashedFile, TensorInfo, read_header

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = (".bin", ".pth")
PICKLES_ALONE = (
    f"holds PyTorch pickles ({', '.join(PICKLES)}) and no {SINGLE_FILE} or {INDEX_FILE}. Convert "
    "it: load it with transformers' from_pretrained and write it with save_pretrained."
)
_WEIGHT_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt"),
    *("*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.ot"),
)


def read_config(path: Path) -> dict[str, Any]:
    """Returns the content of config.json.

    Raises:
        CheckpointError: the folder or the file is missing, or the file is not a JSON object.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder.")
    if not (path / CONFIG_FILE).exists() and (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path} holds a PEFT adapter but no model. Give the adapter's base model, and this folder as lora_adapter_path."
        )
    return read_json(path / CONFIG_FILE, "This is not the folder of a Hugging Face model.")


def load_hf_config(path: Path) -> Any:
    """Returns transformers' configuration of a model folder.

    Raises:
        CheckpointError: transformers cannot read config.json.
    """
    from transformers import AutoConfig  # slow to import, rarely needed

    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers raises many types for a bad config.json
        raise CheckpointError(f"{path / CONFIG_FILE}: transformers cannot read it: {error}") from error


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Returns name -> location of every tensor of a checkpoint, in the order of the files.

    Names are those of transformers' model, also where the files have older names
    (:attr:`~qerl_verl.nvfp4.architectures.Architecture.older_names`).

    Raises:
        CheckpointError: there are no safetensors, a shard of the index is missing, or a file is
            damaged.
    """
    weights = _weight_files(path)
    tensors = {}
    for file in sorted(set(weights)):
        if not (path / file).exists():
            raise CheckpointError(f"{path / file}: missing, but {INDEX_FILE} names it. Fetch it again.")
        tensors |= read_header(path / file)
    for file, names in weights.items():
        for name in names:
            if name not in tensors:
                raise CheckpointError(f"{path / file}: tensor {name}, which {INDEX_FILE} places there, is missing.")
    try:
        architecture = get_architecture(read_config(path))
    except UnsupportedArchitecture:  # reported where the model is requested
        return tensors
    return {architecture.module_name(name): info for name, info in tensors.items()}


def _weight_files(path: Path) -> dict[str, list[str]]:
    """Returns file name -> the tensors that the index places there."""
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if not index.exists():
        if single.exists():
            return {SINGLE_FILE: []}
        if any(file.name.endswith(PICKLES) for file in path.iterdir()):
            raise CheckpointError(f"{path} {PICKLES_ALONE}")
        raise CheckpointError(f"{path} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there.")
    weight_map = read_json(index, "Fetch it again.").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: no weight_map. Fetch it again.")
    files = {}
    for name, file in weight_map.items():
        files.setdefault(file, []).append(name)
    # transformers would load one of the two models, vLLM the other
    if single.exists() and SINGLE_FILE not in files:
        raise CheckpointError(
            f"{path} holds two models, {SINGLE_FILE} and what {INDEX_FILE} lists: give each a folder of its own."
        )
    return files


def source_files(path: Path) -> list[str]:
    """Returns the files of a checkpoint, relative to it: safetensors and visible files without
    weights."""
    weights = _weight_files(path)
    files = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
    names = (file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    return [name for name in names if name in weights or not is_weight_file(name)]


def is_weight_file(name: str) -> bool:
    """Returns whether a file holds weights, or lists such files, by its name."""
    return any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in _WEIGHT_FILES)


def copy_file(src: Path, dst: Path) -> FileRecord:
    """Copies a file and creates the folders above it. Returns its size and SHA-256."""
    dst.parent.mkdir(parents=True, exist_ok=True)
    with src.open("rb") as source, HashedFile(dst) as file:
        while data := source.read(1 << 20):
            file.write(data)
    return file.record


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """Returns the content of a JSON file.

    Args:
        path: the file.
        fix: a sentence for messages, that says what to do.

    Raises:
        CheckpointError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file. {fix}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}). {fix}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object. {fix}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> FileRecord:
    """Writes a JSON file with sorted keys. Returns its size and SHA-256."""
    with HashedFile(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())
    return file.record


def check_space(dst: Path, needed: int) -> None:
    """Refuses a folder to write whose disk has too little free space.

    Args:
        dst: the folder; it need not exist.
        needed: bytes.

    Raises:
        CheckpointError: names the folder, and both sizes.
    """
    parent = next(folder for folder in (dst, *dst.absolute().parents) if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{dst}: needs {as_gigabytes(needed)}, but {as_gigabytes(free)} are free on its disk. Make room or choose another disk."
        )


def as_gigabytes(size: int) -> str:
    """Returns a number of bytes as text for a message."""
    return f"{size / 1e9:.2f} GB"
