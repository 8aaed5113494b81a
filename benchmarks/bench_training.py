"""Measures a LoRA training step with activation checkpointing on NVFP4, against bf16 through PEFT.

    python benchmarks/bench_training.py --shape 7B --json benchmarks/results/training_7b_h200.json
    python benchmarks/bench_training.py --batch 16 --length 768 --profile --variants nvfp4_auto  # a pass of GRPO
    python benchmarks/bench_training.py --shape 32B --batch 10 --length 768 --profile --variants nvfp4_auto

The baselines are PEFT's LoRA on the same weights in bf16, and the same packed weights that the
compressed-tensors library decompresses at every forward pass. ``nvfp4`` is ``qerl.recompute=full``,
and ``nvfp4_selective`` is ``selective``. ``nvfp4_selective_compiled`` also compiles norms and
activation functions, as verl's ``use_torch_compile`` (on by default) does in QeRL's engine.
``nvfp4_auto`` is the engine's default: compiled, and each layer keeps its outputs while they fit.
``--profile`` profiles one more step, with an optimizer's step behind it, and divides the GPU's time
by what was computed (``update_parts.py``). Expected with ``--profile`` on an H100 (not measured):
half a minute a variant for 7B, a minute and a half for 32B, model included. A step
has 8 sequences of 1024 random tokens, transformers' Qwen2 with SDPA, and rank 32 on all linears,
under bfloat16 autocast. A and B have the dtype in which FSDP2 passes them to the forward pass:
float32 in QeRL's engine, and bfloat16, by its mixed precision, in verl's. The loss is the mean
log-probability of the next token over chunks of 1024 tokens with checkpointing, the same for all
variants, so that logits do not decide the memory. Each variant is a process of its own. The error
of the adapters' gradients is measured against float32, on two layers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from result_file import ResultFile, gpu_names
from update_parts import OPTIMIZER_RANGE, divide

BATCH, LENGTH, CHUNK = 8, 1024, 1024
VARIANTS = ("bf16_peft", "nvfp4", "nvfp4_selective", "nvfp4_selective_compiled", "compressed_tensors")
DEFAULT_ENGINE = "nvfp4_auto"


def random_packed(rows: int, columns: int, seed: int):
    import torch

    generator = torch.Generator(device="cuda").manual_seed(seed)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda", generator=generator)
    scale = (torch.rand(rows, columns // 16, device="cuda", generator=generator) * 300 + 20).to(torch.float8_e4m3fn)
    global_scale = torch.full((1,), 3e4 * (columns / 3584) ** 0.5, device="cuda")
    return packed, scale.view(torch.uint8), global_scale


def build(variant: str, shape: str, layers: int | None, dtype):
    """Builds the model with an adapter, on the GPU."""
    import torch
    from accelerate import init_empty_weights
    from peft import LoraConfig, get_peft_model
    from shapes import RANK, config
    from torch import nn
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qerl_verl.engine.compile import compile_layers
    from qerl_verl.engine.recompute import Recompute
    from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
    from qerl_verl.lora.peft import linear_names, register_nvfp4
    from qerl_verl.nvfp4.linear import NVFP4Linear
    from qerl_verl.nvfp4.loading import prepack_linears, swap_linears

    content = config(shape)
    if layers:
        content["num_hidden_layers"] = layers
    settings = Qwen2Config(**content)
    settings._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        model = Qwen2ForCausalLM._from_config(settings, dtype=dtype)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    targets = sorted({n.rpartition(".")[2] for n in names})

    class CompressedTensorsLinear(nn.Module):
        """Decompresses the whole weight at every call, as the library's compressed linear did."""

        def __init__(self, linear: nn.Linear, seed: int):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            packed, scale, global_scale = random_packed(linear.out_features, linear.in_features, seed)
            self.weight_packed = nn.Parameter(packed, requires_grad=False)
            self.register_buffer("weight_scale", scale.view(torch.float8_e4m3fn))
            self.register_buffer("weight_global_scale", global_scale)
            self.bias = (
                None
                if linear.bias is None
                else nn.Parameter(torch.zeros(self.out_features, device="cuda", dtype=dtype))
            )

        def forward(self, x):
            from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor

            state = {"weight_packed": self.weight_packed, **dict(self.named_buffers())}
            with torch.no_grad():
                weight = NVFP4PackedCompressor.decompress(state, None)["weight"].to(x.dtype)
            return nn.functional.linear(x, weight, self.bias)

    ours = variant.startswith("nvfp4")
    if ours:
        swap_linears(model, set(names), dtype)
    modules = dict(model.named_modules())
    for seed, name in enumerate(sorted(names)):
        module = modules[name]
        if variant == "compressed_tensors":
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, CompressedTensorsLinear(module, seed))
            continue
        packed, scale, global_scale = random_packed(module.out_features, module.in_features, seed)
        if isinstance(module, NVFP4Linear):
            joined = torch.cat([packed.flatten(), scale.flatten()])
            module.weight_joined = nn.Parameter(joined, requires_grad=False)
            module.weight_global_scale = global_scale
        else:
            module.weight = nn.Parameter(dequantize_nvfp4(packed, scale, global_scale, dtype), requires_grad=False)
    torch.manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = torch.ones if "norm" in name else torch.zeros if leaf == "bias" else torch.randn
            tensor = value(parameter.shape, device="cuda")  # the same numbers in every dtype
            tensor = (tensor * 0.02 if value is torch.randn else tensor).bfloat16().to(dtype)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model = model.cuda().requires_grad_(False)
    said = None
    if ours:
        said = prepack_linears(model, torch.device("cuda", 0))
    model.enable_input_require_grads()
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=targets)
    if ours:
        assert set(linear_names(model)) == set(targets)
        register_nvfp4(lora)
    if variant == "compressed_tensors":
        from peft.tuners.lora import Linear

        class Wrapped(Linear):
            def _get_in_out_features(self, module):
                return module.in_features, module.out_features

        lora._register_custom_module({CompressedTensorsLinear: Wrapped})
    model = get_peft_model(model, lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = torch.randn(parameter.shape) * (0.01 if "lora_B" in name else parameter.shape[1] ** -0.5)
            parameter.data = value.bfloat16().to("cuda", torch.float32 if ours else dtype)
    checkpointing = {"use_reentrant": False}
    how = "selective" if "selective" in variant else "auto" if variant == DEFAULT_ENGINE else "full"
    recompute = Recompute(how, torch.device("cuda", 0), lambda text: print(f"{variant}: {text}", flush=True))
    if how != "full":
        checkpointing["context_fn"] = recompute.context_fn
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    if variant.endswith("compiled") or variant == DEFAULT_ENGINE:
        said = f"{said}; {compile_layers(model)}"
    model.train()
    model.recompute = recompute
    return model, said


def make_step(model, dtype, length: int = LENGTH, batch: int = BATCH):
    """Returns ``step()``, which runs forward and backward on fixed random tokens and returns the
    loss."""
    import torch
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(2)
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), device="cuda")
    body, head = model.get_base_model().model, model.get_base_model().lm_head

    def chunk_loss(hidden, labels):
        return torch.nn.functional.cross_entropy(head(hidden).float(), labels, reduction="sum")

    def step():
        model.recompute.begin()
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            hidden = body(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            labels = tokens[:, 1:].flatten()
            loss = 0.0
            for begin in range(0, labels.numel(), CHUNK):
                end = begin + CHUNK
                loss = loss + checkpoint(chunk_loss, hidden[begin:end], labels[begin:end], use_reentrant=False)
            loss = loss / labels.numel()
        loss.backward()
        model.recompute.observe()
        return loss

    return step


def run_variant(variant: str, args: argparse.Namespace) -> dict:
    import torch
    from shapes import RANK

    model, said = build(variant, args.shape, args.layers, torch.bfloat16)
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()
    step = make_step(model, torch.bfloat16, args.length, args.batch)
    loss = step().item()
    if variant == DEFAULT_ENGINE:
        step()  # the first one that keeps outputs
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    result = {
        "variant": variant, "kernel": said, "loss": loss, "step_s": statistics.median(times), "steps_s": times,
        "weights_gb": weights / 2**30, "peak_gb": torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip
    if args.profile:
        profile, result["profiled_s"] = profile_update(model, step)
        result["parts_ms"] = divide(profile.events(), result["profiled_s"] * 1e3, model.config.vocab_size, RANK)
        table = profile.key_averages()
        print(table.table(sort_by="self_device_time_total", row_limit=22, max_name_column_width=70), flush=True)
        print("\n".join(f"{ms:9.1f} ms  {part}" for part, ms in result["parts_ms"].items()), flush=True)
    return result


def profile_update(model, step):
    """Profiles a step and an optimizer's step, and returns the profile and their seconds."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def update():
        step()
        with record_function(OPTIMIZER_RANGE):
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

    update()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as found:
        begin = time.perf_counter()
        update()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return found, seconds


def gradient_errors(shape: str, layers: int) -> dict:
    """Returns the relative error of the adapters' gradients against float32, over all of them."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False

    def gradients(variant, dtype):
        model, _ = build(variant, shape, layers, dtype)
        make_step(model, dtype, 256, 2)()
        return {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.requires_grad}

    exact = gradients("bf16_peft", torch.float32)
    out = {}
    for variant in ("bf16_peft", "nvfp4"):
        found = gradients(variant, torch.bfloat16)
        wrong = sum(((found[n] - exact[n]).double() ** 2).sum() for n in exact)
        out[variant] = float((wrong / sum((exact[n].double() ** 2).sum() for n in exact)) ** 0.5)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7B")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=(*VARIANTS, DEFAULT_ENGINE))
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens a sequence")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-gradients", action="store_true", help="leave out the error of the gradients")
    parser.add_argument("--profile", action="store_true", help="divide the GPU's time by what was computed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant == "gradients":
        print("RESULT " + json.dumps(gradient_errors(args.shape, args.layers or 2)), flush=True)
        return
    if args.variant:
        print("RESULT " + json.dumps(run_variant(args.variant, args)), flush=True)
        return

    out = {
        "command": "python benchmarks/bench_training.py " + " ".join(sys.argv[1:]),
        "shape": args.shape,
        "tokens": args.batch * args.length,
        "gpu": (gpu_names() or ["none"])[0],
        "versions": {p: version(p) for p in ("torch", "transformers", "peft", "compressed-tensors")},
        "runs": {},
    }
    with ResultFile(args.json, out) as file:
        for name in file.steps((*args.variants, *([] if args.no_gradients else ["gradients"]))):
            result = start_variant(name, args)
            if result is None:
                file.fail(name, "failed, see its output")
            elif name == "gradients":
                file.content["gradient_error_against_float32"] = result
            else:
                file.content["runs"][name] = result
                file.content["ratios"] = ratios_of(file.content["runs"])
        print(json.dumps(file.content.get("ratios", {})), flush=True)
    sys.exit(file.exit_code)


def start_variant(name: str, args: argparse.Namespace) -> dict | None:
    """Runs a variant in a process of its own, prints a line for it, and returns its result."""
    command = [sys.executable, __file__, "--variant", name, "--shape", args.shape, "--repeats", str(args.repeats)]
    command += ["--batch", str(args.batch), "--length", str(args.length)]
    command += ["--layers", str(args.layers)] if args.layers else []
    command += ["--profile"] if args.profile else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ)
    lines = done.stdout.splitlines()
    if args.profile:
        print("\n".join(line for line in lines if not line.startswith("RESULT ")), flush=True)
    found = [line for line in lines if line.startswith("RESULT ")]
    if not found:
        print(f"{name} failed with {done.returncode}", *lines[-10:], sep="\n", flush=True)
        return None
    result = json.loads(found[0].removeprefix("RESULT "))
    print(name, json.dumps(result), flush=True)
    return result


def ratios_of(runs: dict[str, dict]) -> dict[str, dict[str, float]]:
    """Returns speed and peak memory of each NVFP4 variant against each baseline."""
    return {
        f"{name} against {base}": {
            "speed": runs[base]["step_s"] / runs[name]["step_s"],
            "peak_memory": runs[name]["peak_gb"] / runs[base]["peak_gb"],
        }
        for name in runs
        for base in runs
        if name.startswith("nvfp4") and not base.startswith("nvfp4")
    }


if __name__ == "__main__":
    main()
