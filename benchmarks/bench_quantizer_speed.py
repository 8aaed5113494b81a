"""Measures time and memory of quantizing a model of random weights, by each method.

    python benchmarks/bench_quantizer_speed.py --shape 7B --json benchmarks/results/quantizer_speed_7b_h100.json

The model is written to a local disk, so its files are in the page cache of the host when they are
read. Rates refer to the 16-bit checkpoint, from the first byte read to the finished folder,
including all hashes and the write to disk. GPTQ calibrates with random tokens; its time does not
depend on their values. Each method is a process of its own. ``--layers`` shortens the model;
``seconds_of_all_layers`` is then the time without the first and last tensors, scaled to all layers.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from result_file import ResultFile

METHODS = ("rtn", "four-over-six", "gptq")
SEQUENCES, HELD_OUT = 128, 8


def write_model(folder: Path, shape: str, layers: int) -> dict[str, int]:
    """Writes a 16-bit checkpoint with normal weights, one layer per file.

    Returns:
        The bytes of a layer and of everything.
    """
    import torch
    from safetensors.torch import save_file
    from shapes import DEVICE, SHAPES, config, linears

    folder.mkdir(parents=True)
    content = config(shape) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(content))
    hidden, vocabulary = content["hidden_size"], content["vocab_size"]
    torch.manual_seed(0)
    map_, sizes = {}, []

    def normal(*size: int, mean: float = 0.0, std: float = 0.02) -> torch.Tensor:
        return (torch.randn(*size, device=DEVICE) * std + mean).bfloat16().cpu()

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        map_.update(dict.fromkeys(tensors, name))
        sizes.append((folder / name).stat().st_size)

    for layer in range(layers):
        prefix, tensors = f"model.layers.{layer}.", {}
        for name, (rows, columns) in linears(shape).items():
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns)
            if name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                tensors[f"{prefix}{name}.bias"] = normal(rows)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = normal(hidden, mean=1.0)
        save(f"model-{layer:02}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": normal(vocabulary, hidden), "model.norm.weight": normal(hidden, mean=1.0)}
    if not SHAPES[shape]["tie_word_embeddings"]:
        ends["lm_head.weight"] = normal(vocabulary, hidden)
    save("model-ends.safetensors", ends)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": map_}))
    return {"layer_bytes": sizes[0], "bytes": sum(sizes)}


def run(folder: Path, destination: Path, method: str, tokens: int) -> dict:
    """Quantizes in a process of its own, and returns its time and memory."""
    import torch
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401  (the import must not be timed)

    from qerl_verl.nvfp4.calibration import Calibration
    from qerl_verl.nvfp4.quantize import quantize_checkpoint

    calibration = None
    if method == "gptq":
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        torch.manual_seed(1)
        ids = torch.randint(vocabulary, (SEQUENCES + HELD_OUT, tokens)).tolist()
        sequences = tuple((tuple(row), 0) for row in ids)
        calibration = Calibration(sequences[:SEQUENCES], sequences[SEQUENCES:], "random tokens")
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # the context must not be timed either
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    quantize_checkpoint(folder, destination, method=method, calibration=calibration)
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"seconds": seconds, "peak_gpu_bytes": gpu, "peak_host_bytes_above_start": peak * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B", help="of benchmarks/shapes.py (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="of the shape's (default: all)")
    parser.add_argument(
        "--all-layers", type=int, help="of the model that the times are scaled to (default: the shape's)"
    )
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--tokens", type=int, default=512, help=f"in each of {SEQUENCES} sequences (default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, help="folder on a local disk (default: a temporary one)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # model, destination, method
    arguments = parser.parse_args()
    if arguments.one:
        source, destination, method = arguments.one
        print(json.dumps(run(Path(source), Path(destination), method, arguments.tokens)))
        return

    import torch
    from bench_quantizers import processor, short
    from shapes import SHAPES

    everything = arguments.all_layers or SHAPES[arguments.shape]["num_hidden_layers"]
    layers = arguments.layers or everything
    command = shlex.join(["python", f"benchmarks/{Path(__file__).name}", *map(short, sys.argv[1:])])
    result = {"command": command, "shape": arguments.shape, "layers": layers}
    result |= {"all_layers": everything, "processor": processor(), "methods": {}}
    result |= {"versions": {name: version(name) for name in ("torch", "transformers")}}
    result |= {"calibration_tokens": SEQUENCES * arguments.tokens}
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary, ResultFile(arguments.json, result) as file:
        result = file.content
        source, destination = Path(temporary) / "model", Path(temporary) / "nvfp4"
        result |= write_model(source, arguments.shape, layers)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        for method in file.steps(arguments.methods):
            options = ["--tokens", str(arguments.tokens), "--one", str(source), str(destination), method]
            done = subprocess.run([sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                file.fail(method, f"exit code {done.returncode}")
                continue
            values = json.loads(done.stdout.splitlines()[-1])
            values["gb_per_second"] = result["bytes"] / values["seconds"] / 1e9
            share = layers * result["layer_bytes"] / result["bytes"] if method != "gptq" else 1.0
            values["seconds_of_all_layers"] = values["seconds"] * share * everything / layers
            result["methods"][method] = values
            shutil.rmtree(destination)
    print(f"{arguments.shape}, {layers} layers, {result['bytes'] / 1e9:.1f} GB, {result['processor']}")
    print(f"{'':16}{'seconds':>9}{'GB/s':>7}{f'{everything} layers':>12}{'GPU GB':>8}{'host GB':>9}")
    for method, v in result["methods"].items():
        print(
            f"{method:16}{v['seconds']:9.1f}{v['gb_per_second']:7.2f}{v['seconds_of_all_layers']:12.0f}"
            f"{v['peak_gpu_bytes'] / 1e9:8.1f}{v['peak_host_bytes_above_start'] / 1e9:9.1f}"
        )
    sys.exit(file.exit_code)


if __name__ == "__main__":
    main()
