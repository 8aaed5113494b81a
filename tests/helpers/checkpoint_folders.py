"""Reads, edits and quantizes folders of tiny checkpoints."""

import json

from safetensors.torch import load_file, save_file

from qerl_verl.nvfp4.quantize import quantize_checkpoint


def load(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def edit_weights(folder, change):
    """Rewrites model.safetensors after ``change(tensors)``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def quantized(make_checkpoint, tmp_path, *args, method="rtn", **kwargs):
    src, dst = make_checkpoint(*args, **kwargs), tmp_path / "dst"
    quantize_checkpoint(src, dst, method=method, progress=False)
    return src, dst
