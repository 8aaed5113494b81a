"""Compares quantizers on a real model: loss, KL divergence, entropy and time.

    python benchmarks/bench_quantizers.py --model MODEL --train train.jsonl --test test.jsonl \
        --json benchmarks/results/quantizers_smollm2_135m_cpu.json

The loss is that of the answers to the first problems of ``--test``, teacher-forced in the model's
chat template. The KL divergence is KL(16 bits || NVFP4) of the predictions. All are in nats per
token, over the answers and the end of their turn, which no quantizer has seen. GPTQ calibrates with
problems and answers of ``--train``, spread evenly over the file. A CPU computes everything in
float32. ``--checkpoint NAME=FOLDER`` also measures an NVFP4 folder of another tool.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from result_file import ResultFile

from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.calibration import encode_row, load_tokenizer, read_calibration
from qerl_verl.nvfp4.checkpoint_files import load_hf_config, read_headers
from qerl_verl.nvfp4.decoder import LayerwiseDecoder
from qerl_verl.nvfp4.layerwise import load_packed_weights
from qerl_verl.nvfp4.model_shapes import split_experts
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.quantizers import METHODS


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor()}, {capability}, {torch.get_num_threads()} threads"


def short(argument: str) -> str:
    """Returns an argument for the result file, without the folders of this machine."""
    return Path(argument).name if Path(argument).is_absolute() else argument


@torch.no_grad()
def measure(model: Path, folders: dict[str, Path], sequences, device: torch.device) -> dict[str, dict[str, float]]:
    """Returns loss, KL divergence and entropy of NVFP4 folders, in one pass over the 16-bit
    layers."""
    config = load_hf_config(model)
    architecture = get_architecture(config)
    decoder = LayerwiseDecoder(config, split_experts(read_headers(model), architecture, config), device)
    headers = {name: read_headers(folder) for name, folder in folders.items()}
    reference = decoder.embed(sequences)
    streams = {name: [activations.copy() for activations in reference] for name in folders}
    for index in range(len(decoder)):
        layer = decoder.load_layer(index)
        for activations in reference:
            activations.advance(layer, index)
        linears = [linear for group in architecture.layer_groups(config, index) for linear in group]
        for name, stream in streams.items():
            load_packed_weights(layer, f"{architecture.layer_prefix}{index}.", linears, headers[name])
            for activations in stream:
                activations.advance(layer, index)
        decoder.drop_layer(index)
        print(f"measured layer {index + 1} of {len(decoder)}", file=sys.stderr, flush=True)
    return {name: decoder.compare(stream, reference) for name, stream in streams.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a 16-bit model with a chat template")
    parser.add_argument(
        "--train", type=Path, required=True, help="JSONL with `question` and `answer`, to calibrate with"
    )
    parser.add_argument("--test", type=Path, required=True, help="the same, to measure on")
    parser.add_argument("--problems", type=int, default=60, help="of the test part (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=64, help="of the training part (default: %(default)s)")
    parser.add_argument("--sample-tokens", type=int, default=256, help="length to cut them to (default: %(default)s)")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument(
        "--checkpoint", nargs="*", default=[], metavar="NAME=FOLDER", help="NVFP4 folders to measure, too"
    )
    parser.add_argument("--work", type=Path, help="folder for the checkpoints, kept; those that are there are used")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calibration = read_calibration(
        arguments.train, arguments.model, samples=arguments.samples, sample_tokens=arguments.sample_tokens
    )
    tokenizer = load_tokenizer(arguments.model)
    with arguments.test.open() as lines:
        rows = [json.loads(line) for line in islice(lines, arguments.problems)]
    sequences = [encode_row(row, tokenizer, 10**6, "prompt") for row in rows]
    result = {
        "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *map(short, sys.argv[1:])]),
        "model": arguments.model.name,
        "processor": processor(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "calibration": calibration.describe(),
        "problems": arguments.problems,
        "methods": {},
    }
    with tempfile.TemporaryDirectory() as temporary, ResultFile(arguments.json, result) as file:
        result = file.content
        work = arguments.work or Path(temporary)
        folders = {name: Path(folder) for name, _, folder in (c.partition("=") for c in arguments.checkpoint)}
        for method in arguments.methods:
            folders[method] = work / method
            if not folders[method].exists():
                started = time.monotonic(), time.process_time()
                quantize_checkpoint(
                    arguments.model, work / method, method=method, calibration=calibration if method == "gptq" else None
                )
                wall, cpu = time.monotonic() - started[0], time.process_time() - started[1]
                result["methods"][method] = {"seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}
                file.save()
        for name, values in measure(arguments.model, folders, sequences, device).items():
            result["tokens"], result["loss_16bit"] = values.pop("tokens"), values.pop("reference_loss")
            result["methods"][name] = values | result["methods"].get(name, {})
    print(f"{'':16}{'loss':>8}{'KL':>8}{'entropy':>9}{'seconds':>9}\n{'16 bits':16}{result['loss_16bit']:8.3f}")
    for name, values in result["methods"].items():
        took = f"{values['seconds']:9.0f}" if "seconds" in values else ""
        print(f"{name:16}{values['loss']:8.3f}{values['kl']:8.3f}{values['entropy']:9.3f}{took}")


if __name__ == "__main__":
    main()
