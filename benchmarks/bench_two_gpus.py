"""Measures NVFP4 beside bf16 on two GPUs: an FSDP2 training step, tensor-parallel rollout,
main_ppo.

    export PYTHONPATH=.    # at the top of the repository, for the helpers in tests/
    python benchmarks/bench_two_gpus.py --json benchmarks/results/two_gpus_7b_h200.json
    python benchmarks/bench_two_gpus.py --parts training rollout
    # to try it on the CPU
    export SMALL="--shape tiny --small tiny --ppo-shape tiny --length 32 --sequences 2"
    python benchmarks/bench_two_gpus.py $SMALL

Parts, in this order:

- ``training``: forward, backward and update of the model that an FSDP2 engine builds, with 4
  sequences of 1024 random tokens per GPU and again with 1, activation checkpointing, and rank 32 on
  all linears. NVFP4 runs in QeRL's engine. The baseline is verl's own engine on the same weights in
  bf16, held in bf16, with PEFT's LoRA. The loss is bench_training.py's. One more step counts what
  the all-gathers moved.
- ``equality``: three updates of verl's PPO step on a small model from the same adapter: on one GPU,
  on two under FSDP2, on two under Ulysses sequence parallelism, and with stock verl in bf16 on one
  and on two. Without flash-attn, Ulysses computes attention through PyTorch's SDPA, sequence by
  sequence, and so do the other runs here. Each rank also compares the packed bytes that it has
  gathered with the checkpoint.
- ``rollout``: bench_rollout.py with the model divided over the two GPUs.
- ``shards``: log-probabilities of given tokens with the model divided and on one GPU; the adapter
  is sent as verl sends it.
- ``main_ppo``: end to end with the switch on both GPUs. The rollout is divided over them
  (``divided``), is on each (``replicas``), or has one GPU and the actor the other (``separate``,
  verl's ``separate_async``). On request, ``separate_nccl`` uses verl's NCCL transport, which needs
  CuPy. After each weight sync every rollout worker reports its adapter and its norms.

NVLink multicast is off in all parts.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import types
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from result_file import ResultFile

from qerl_verl.job import JOB_ENV, Job

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

PARTS = ("training", "equality", "rollout", "shards", "main_ppo")
ARRANGEMENTS = ("divided", "replicas", "separate", "separate_nccl")
BASES = {"bf16_lora": "bf16", "nvfp4_lora": "nvfp4"}
CHUNK = 2048
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
}
ON_THE_CPU = {
    **Job().environment(),
    "VERL_PLATFORM": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def prepare(args: argparse.Namespace) -> None:
    """Writes the models of the chosen parts, in a process of its own, because it uses the GPU."""
    from shapes import SHAPES, write_adapter, write_bf16, write_nvfp4

    from qerl_verl.quickstart.tiny_model import build_tokenizer

    work = Path(args.work)
    readers = ((args.shape, {"training", "rollout"}), (args.small, {"equality", "shards"}))
    for shape in {shape for shape, parts in readers if parts & set(args.parts)}:
        begin = time.perf_counter()
        nvfp4, bf16, adapter = (work / f"{shape}-{kind}" for kind in ("nvfp4", "bf16", "adapter"))
        if not (nvfp4 / "vocab.json").exists():
            write_nvfp4(nvfp4, shape)
        if not (bf16 / "vocab.json").exists():
            write_bf16(bf16, nvfp4, shape)
        if not (adapter / "adapter_config.json").exists():
            write_adapter(adapter, shape, str(nvfp4))
        tokenizer = build_tokenizer()
        assert len(tokenizer) <= SHAPES[shape]["vocab_size"]
        for folder in (nvfp4, bf16):
            tokenizer.save_pretrained(folder)
        print(f"wrote {shape} in {time.perf_counter() - begin:.0f} s", flush=True)


# ---- in the process of a rank


def start_rank(args: argparse.Namespace) -> str:
    """Joins the process group and returns the type of the device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(args.rank)
    import verl  # noqa: F401  (on the CPU, with the switch, it registers the platform)
    from verl.utils.distributed import initialize_global_process_group_ray

    initialize_global_process_group_ray()
    return device


def make_engine(folder: Path, stock: bool, attention: str, packed: bool, ulysses: int = 1, lr: float = 1e-3):
    """Builds an actor's FSDP2 engine on a folder's model: verl's own, or QeRL's."""
    from shapes import RANK
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.fsdp import FSDPEngineWithLMHead

    from qerl_verl.engine.nvfp4 import NVFP4EngineWithLMHead

    engine = (FSDPEngineWithLMHead if stock else NVFP4EngineWithLMHead)(
        model_config=HFModelConfig(
            path=str(folder),
            lora_rank=RANK,
            lora_alpha=RANK,
            enable_gradient_checkpointing=True,
            override_config={"attn_implementation": attention},
            use_remove_padding=packed,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="bfloat16",
            use_torch_compile=False,
            ulysses_sequence_parallel_size=ulysses,
        ),
        optimizer_config=FSDPOptimizerConfig(lr=lr, lr_warmup_steps=0, total_training_steps=100),
        checkpoint_config=CheckpointConfig(),
    )
    engine.initialize()
    return engine


def mean_loss(model, input_ids, **_):
    """Replaces the causal model's forward pass by the mean log-probability of the next token.

    It is computed in chunks of 2048 tokens.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    def chunk_loss(hidden, labels):
        return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), labels, reduction="sum")

    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    labels, loss = input_ids[:, 1:].flatten(), 0.0
    for begin in range(0, labels.numel(), CHUNK):
        part = slice(begin, begin + CHUNK)
        loss = loss + checkpoint(chunk_loss, hidden[part], labels[part], use_reentrant=False)
    return loss / labels.numel()


def everywhere(value) -> list:
    """Returns the values of all ranks."""
    import torch

    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def measure_training(name: str, device: str, args: argparse.Namespace) -> dict:
    import torch

    from tests.engine.many_ranks import bytes_per_weight, count_all_gathers, randomize_adapters

    gpu = device == "cuda"
    begin = time.perf_counter()
    engine = make_engine(Path(args.work) / f"{args.shape}-{BASES[name]}", BASES[name] == "bf16", "sdpa", False, lr=1e-6)
    base = engine.module.get_base_model()
    base.forward = types.MethodType(mean_loss, base)
    result = {"build_s": time.perf_counter() - begin, "by_sequences": {}}
    with engine.train_mode():
        randomize_adapters(engine, 0.01)
        if gpu:
            torch.cuda.empty_cache()
            result["weights_gb"] = everywhere(torch.cuda.memory_allocated() / 2**30)

        def step(tokens):
            engine.optimizer_zero_grad()
            recompute = getattr(engine, "_recompute", None)  # as in the engine's forward_step
            if recompute:
                recompute.begin()
            with torch.autocast(device, torch.bfloat16):
                loss = engine.module(input_ids=tokens)
            loss.backward()
            if recompute:
                recompute.observe()
            engine.optimizer_step()
            if gpu:
                torch.cuda.synchronize()
            return loss.item()

        for sequences in (4, 1):
            torch.manual_seed(10 + args.rank)
            tokens = torch.randint(0, base.config.vocab_size, (sequences, args.length), device=device)
            losses, times = [step(tokens)], []
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(args.repeats):
                torch.distributed.barrier()
                begin = time.perf_counter()
                losses.append(step(tokens))
                times.append(time.perf_counter() - begin)
            seconds = statistics.median(times)
            result["by_sequences"][sequences] = {
                "step_s": everywhere(seconds),
                "tokens_per_s": args.world * sequences * args.length / max(everywhere(seconds)),
                "peak_gb": everywhere(torch.cuda.max_memory_allocated() / 2**30) if gpu else None,
                "loss": everywhere(losses[0]),
            }
        seen = count_all_gathers(engine.module)
        step(tokens)
    layers = {place: calls for place, calls in seen.items() if ".layers." in place}
    by_weight = {
        bytes_per_weight(engine.module.get_submodule(place), size) for place, calls in layers.items() for size in calls
    }
    result["all_gather"] = {
        "calls": sum(len(calls) for calls in seen.values()),
        "gb": sum(sum(calls) for calls in seen.values()) / 2**30,
        "of_layers_gb": sum(sum(calls) for calls in layers.values()) / 2**30,
        "a_layer_mb": max(max(calls) for calls in layers.values()) / 2**20,
        "bytes_per_weight_of_linears": sorted(by_weight),
    }
    return result


def measure_equality(name: str, device: str, args: argparse.Namespace) -> dict:
    import torch
    from shapes import SHAPES

    from tests.engine.many_ranks import (
        changed_bytes,
        full,
        loss_function,
        randomize_adapters,
        use_packed_attention,
        verl_batch,
    )

    stock = name.startswith("bf16")
    folder = Path(args.work) / f"{args.small}-{'bf16' if stock else 'nvfp4'}"
    engine = make_engine(folder, stock, use_packed_attention(), True, ulysses=2 if name.endswith("ulysses") else 1)
    result = {"loss": [], "grad_norm": []}
    with engine.train_mode():
        randomize_adapters(engine, 0.02)
        trained = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
        tensors = {"start": {n: full(p.detach()).float().cpu().clone() for n, p in trained}}
        for step in range(3):
            data = verl_batch(
                step,
                engine.get_data_parallel_rank(),
                engine.get_data_parallel_size(),
                longer=args.longer,
                vocabulary=SHAPES[args.small]["vocab_size"],
                use_remove_padding=True,
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=4,
            )
            output = engine.train_batch(data, loss_function())
            engine.lr_scheduler_step()
            if step == 0:
                tensors["gradient"] = {n: full(p.grad).float().cpu().clone() for n, p in trained}
            result["loss"].append(statistics.mean(everywhere(sum(output["loss"]))))
            result["grad_norm"].append(next(n for n in everywhere(output["metrics"].get("grad_norm")) if n is not None))
        tensors["end"] = {n: full(p.detach()).float().cpu().clone() for n, p in trained}
        if not stock:
            result["changed_bytes"] = everywhere(changed_bytes(engine, str(folder)))
    if args.rank == 0:
        torch.save(tensors, Path(args.work) / f"{name}.pt")
    return result


def run_rank(args: argparse.Namespace) -> None:
    """Runs the jobs of one rank in order, and writes each result to a file at once."""
    import gc

    import torch

    device = start_rank(args)
    for job in args.jobs:
        name, _, what = job.partition(":")
        begin = time.perf_counter()
        result = (measure_training if what == "training" else measure_equality)(name, device, args)
        result["job_s"] = time.perf_counter() - begin
        if args.rank == 0:
            (Path(args.work) / f"{what}-{name}.json").write_text(json.dumps(result))
            print(job, json.dumps(result), flush=True)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_shards(args: argparse.Namespace) -> None:
    """Computes log-probabilities of given tokens on ``world`` GPUs, clean and with noise."""
    import torch
    from shapes import DEVICE, RANK, SHAPES
    from vllm import LLM

    from qerl_verl.rollout.probes import adapter_digest, norm_weights
    from tests.rollout.tensor_parallel import prompt_log_probabilities, sync

    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to the workers
    os.environ["VERL_RAY_JOB_ID"] = str(os.getpid())  # part of the name of verl's socket
    work = Path(args.work)
    adapter = work / f"{args.small}-adapter"
    memory = {"gpu_memory_utilization": 0.5} if DEVICE == "cuda" else {}
    llm = LLM(
        str(work / f"{args.small}-nvfp4"),
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="mp",
        dtype="bfloat16",
        max_model_len=256,
        enable_prefix_caching=False,
        tensor_parallel_size=args.world,
        worker_extension_cls="qerl_verl.rollout.worker.QeRLWorkerExtension",
        additional_config={"qerl": {"kernel": "auto", "lora": {"rank": RANK, "alpha": RANK}, "noise": True}},
        **memory,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, SHAPES[args.small]["vocab_size"], (8, 100), generator=generator).tolist()
    result = {"without_adapter": prompt_log_probabilities(llm, prompts)}
    begin = time.perf_counter()
    sync(llm, str(adapter), args.world)
    result["sync_s"] = time.perf_counter() - begin
    digests = llm.collective_rpc(adapter_digest)
    llm.collective_rpc("qerl_load_adapter_folder", args=(str(adapter),))
    result["sync_is_load"] = digests == llm.collective_rpc(adapter_digest)
    result["clean"] = prompt_log_probabilities(llm, prompts)
    llm.collective_rpc("qerl_set_noise", args=(42, 3, 1e-2))
    norms = llm.collective_rpc(norm_weights)
    result["norms_equal"] = all(n == norms[0] for n in norms)
    result["norms"] = {name: weights[:64] for name, weights in norms[0].items()}
    result["noised"] = prompt_log_probabilities(llm, prompts)
    Path(work / f"shards-{args.world}.json").write_text(json.dumps(result))


# ---- in the process that starts the others


@contextmanager
def measured(result: ResultFile, name: str):
    """Records the time of a part, or its error; the other parts run in either case."""
    begin = time.perf_counter()
    try:
        yield
    except Exception as error:
        result.fail(name, f"{type(error).__name__}: {error}")
    result.content.setdefault("part_s", {})[name] = time.perf_counter() - begin


def environment_of(switched: bool = True, **more: str) -> dict[str, str]:
    """Returns the environment of a process to start.

    On the CPU its ranks need the platform of the switch, which ``switched`` enables.
    """
    import torch

    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "HF_HUB_OFFLINE": "1",
        **NO_MULTICAST,
    }
    defaults |= ON_THE_CPU if switched and not torch.cuda.is_available() else {}
    return {**defaults, **os.environ, **more}


def run_here(worker: str, args: argparse.Namespace, environment: dict[str, str], *more: str) -> subprocess.Popen:
    """Starts this file again as ``worker``, with its output in a file beside the results."""
    command = [sys.executable, __file__, "--worker", worker, "--work", str(args.work), "--shape", args.shape]
    command += ["--small", args.small, "--length", str(args.length), "--repeats", str(args.repeats)]
    command += ["--longer", str(args.longer), "--parts", *args.parts, *more]
    name = "-".join(["log", worker, *(m for m in more if not m.startswith("--"))]).replace(":", "_")
    log = args.logs / name
    with log.open("wb") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=subprocess.STDOUT, env=environment)
    process.log = log
    return process


def finish(processes: list[subprocess.Popen], seconds: float) -> None:
    """Waits for processes.

    Raises:
        RuntimeError: one failed or did not end in time; has the end of its log. All are ended then.
    """
    end = time.monotonic() + seconds
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.poll() for p in processes):  # the others would wait for the failed one
                break
            time.sleep(0.2)
    finally:
        codes = [p.poll() for p in processes]
        for process in processes:
            process.kill()
            process.wait()
    for process, code in zip(processes, codes, strict=True):
        if code:
            raise RuntimeError(f"code {code}: {process.log.read_text(errors='replace')[-3000:]}")
    if None in codes:
        raise RuntimeError(f"not within {seconds} s: {processes[0].log.read_text(errors='replace')[-3000:]}")


def run_ranks(world: int, jobs: list[str], args: argparse.Namespace) -> dict:
    """Runs ``jobs`` on ``world`` ranks and returns the results by name."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    files = {job: args.work / f"{job.partition(':')[2]}-{job.partition(':')[0]}.json" for job in jobs}
    for file in files.values():
        file.unlink(missing_ok=True)
    ranks = []
    for rank in range(world):
        group = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = environment_of(**{k: str(v) for k, v in group.items()})
        ranks.append(run_here("rank", args, environment, "--rank", str(rank), "--world", str(world), "--jobs", *jobs))
    try:
        finish(ranks, args.timeout)
    finally:
        for rank in ranks[:1]:
            text = rank.log.read_text(errors="replace")
            print("\n".join(line for line in text.splitlines() if line.startswith(("[qerl]", *jobs))), flush=True)
    return {job.partition(":")[0]: json.loads(file.read_text()) for job, file in files.items()}


def compare_training(runs: dict) -> dict:
    ours, base = runs["nvfp4_lora"], runs["bf16_lora"]
    return {
        sequences: {
            "speed": found["tokens_per_s"] / base["by_sequences"][sequences]["tokens_per_s"],
            "peak_memory": max(found["peak_gb"]) / max(base["by_sequences"][sequences]["peak_gb"])
            if found["peak_gb"]
            else None,
        }
        for sequences, found in ours["by_sequences"].items()
    }


def compare_equality(runs: dict, work: Path) -> dict:
    """Compares each run with that of one GPU on the same base."""
    import torch

    def distance(a: dict, b: dict) -> float:
        return float(sum((a[n] - b[n]).double().square().sum() for n in b) ** 0.5)

    out = {}
    for name in runs:
        one = f"{name.partition('_')[0]}_one"
        if name == one or one not in runs:
            continue
        found, expected = (torch.load(work / f"{n}.pt") for n in (name, one))
        nothing = {n: torch.zeros_like(t) for n, t in expected["gradient"].items()}
        pairs = {k: list(zip(runs[name][k], runs[one][k], strict=True)) for k in ("loss", "grad_norm")}
        out[name] = {
            "loss_difference": max(abs(a - b) for a, b in pairs["loss"]),
            "grad_norm_relative": max(abs(a - b) / b for a, b in pairs["grad_norm"]),
            "first_gradient_relative": distance(found["gradient"], expected["gradient"])
            / distance(nothing, expected["gradient"]),
            "adapter_of_the_way": distance(found["end"], expected["end"])
            / distance(expected["start"], expected["end"]),
        }
    return out


def compare_shards(work: Path) -> dict:
    one, two = (json.loads((work / f"shards-{n}.json").read_text()) for n in (1, 2))
    out = {"norms_equal_on_both": two["norms_equal"], "norms_equal_to_one": two["norms"] == one["norms"]}
    out |= {f"{k}_{n}": d[k] for n, d in ((1, one), (2, two)) for k in ("sync_s", "sync_is_load")}
    for what in ("without_adapter", "clean", "noised"):
        differences = [abs(a - b) for a, b in zip(one[what], two[what], strict=True)]
        out[what] = {"tokens": len(differences), "mean": statistics.mean(differences), "max": max(differences)}
    for what in ("without_adapter", "noised"):  # a scale for the differences above
        differences = [abs(a - b) for a, b in zip(one[what], one["clean"], strict=True)]
        out[f"{what}_to_clean_on_one"] = {"mean": statistics.mean(differences), "max": max(differences)}
    return out


def measure_rollout(args: argparse.Namespace) -> dict:
    file = args.work / "rollout.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "bench_rollout.py"), "--shape", args.shape, "--work", str(args.work)]
    command += ["--tensor-parallel", "2", "--sequences", *map(str, args.sequences), "--json", str(file)]
    command += ["--generated", str(args.generated)]
    environment = environment_of()
    environment.pop(JOB_ENV, None)
    subprocess.run(command, env=environment, timeout=args.timeout, check=True)
    return json.loads(file.read_text())


def measure_main_ppo(arrangement: str, args: argparse.Namespace) -> dict:
    """Runs four steps, two without and two with noise."""
    import torch
    from bench_grpo_step import SHORT, command, metrics_of

    from tests.integration.watch_replicas import read

    work = args.work / "ppo" / args.ppo_shape
    work.mkdir(parents=True, exist_ok=True)
    environment = environment_of(False, VERL_LOGGING_LEVEL="WARNING", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    environment["QERL_TEST_WATCH"] = str(work / f"watched-{arrangement}")
    prepared = [sys.executable, str(HERE / "bench_grpo_step.py"), "--prepare", "--shape", args.ppo_shape]
    subprocess.run([*prepared, "--work", str(work.parent)], env=environment, check=True)
    rollout = "actor_rollout_ref.rollout"
    settings = [
        "trainer.n_gpus_per_node=2",
        f"{rollout}.tensor_model_parallel_size={2 if arrangement == 'divided' else 1}",
        f"{rollout}.n=4",
        f"{rollout}.gpu_memory_utilization=0.1",
        "data.max_response_length=64",
        "actor_rollout_ref.actor.optim.lr=1e-3",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=8",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=8",
        "qerl.aqn.num_stages=2",
        "qerl.aqn.sigma_end=1e-2",
        "trainer.v1.sampler.custom_sampler.path=pkg://tests.integration.watch_replicas",
        "trainer.v1.sampler.custom_sampler.name=WatchedReplayBuffer",
        f"qerl.cache_dir={work / 'cache'}",
        f"{rollout}.agent.num_workers=2",
        "reward.num_workers=1",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
    ]
    separate = arrangement.startswith("separate")
    if separate:
        settings += [
            "trainer.v1.trainer_mode=separate_async",
            "trainer.v1.separate_async.parameter_sync_step=2",
            "actor_rollout_ref.hybrid_engine=False",
            "trainer.n_gpus_per_node=1",
            f"{rollout}.nnodes=1",
            f"{rollout}.n_gpus_per_node=1",
            "data.train_batch_size=16",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        ]
    if arrangement == "separate_nccl":
        settings += [f"{rollout}.checkpoint_engine.backend=nccl"]
    if not torch.cuda.is_available():
        settings += [f"{rollout}.agent.num_workers=1", f"{rollout}.max_model_len=512", "data.train_batch_size=4"]
        settings += ["data.max_response_length=8"]
        settings += [f"actor_rollout_ref.actor.ppo_mini_batch_size={2 if separate else 4}"]
    line = command("nvfp4_lora", work, SHORT, 4, settings)
    begin = time.perf_counter()
    log = args.logs / f"log-main_ppo-{arrangement}"
    with log.open("wb") as handle:
        process = subprocess.Popen(
            line, stdout=handle, stderr=subprocess.STDOUT, env=environment, cwd=work, start_new_session=True
        )
    process.log = log
    finish([process], args.timeout)
    seconds = time.perf_counter() - begin
    text = log.read_text(errors="replace")
    print(
        "\n".join(sorted({"[qerl]" + t.split("[qerl]")[1] for t in text.splitlines() if "[qerl] kernel" in t})),
        flush=True,
    )
    return {
        "command": " ".join(line[1:]),
        "total_s": seconds,
        "steps": metrics_of(text),
        **read(environment["QERL_TEST_WATCH"]),
    }


def start_training(args: argparse.Namespace) -> dict:
    """Runs the training step of both bases on two ranks."""
    runs = run_ranks(2, [f"{name}:training" for name in BASES], args)
    return {"length": args.length, "runs": runs, "ratio_to_bf16_lora": compare_training(runs)}


def start_equality(args: argparse.Namespace) -> dict:
    """Runs the same three updates on two ranks and on one."""
    jobs = [f"{name}:equality" for name in ("nvfp4_fsdp", "nvfp4_ulysses", "bf16_fsdp")]
    runs = run_ranks(2, jobs, args) | run_ranks(1, ["nvfp4_one:equality", "bf16_one:equality"], args)
    return {"runs": runs, "to_one_gpu": compare_equality(runs, args.work)}


def start_shards(args: argparse.Namespace) -> dict:
    """Computes log-probabilities on one GPU and divided over two."""
    for world in (1, 2):
        environment = environment_of(VLLM_PLUGINS="qerl", **Job().environment())
        environment |= {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
        finish([run_here("shards", args, environment, "--world", str(world))], args.timeout)
    return compare_shards(args.work)


MEASUREMENTS = {
    "training": start_training,
    "equality": start_equality,
    "rollout": measure_rollout,
    "shards": start_shards,
}
"""Parts but ``main_ppo``, each with the function that returns its result."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--shape", default="7B", help="of training and rollout")
    parser.add_argument("--small", default="7B-2", help="shape of equality and shards")
    parser.add_argument("--ppo-shape", default="0.5B")
    parser.add_argument("--length", type=int, default=1024, help="tokens a sequence in training")
    parser.add_argument("--longer", type=int, default=10, help="equality: a sequence has 10 to 17 times so many tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sequences", type=int, nargs="*", default=[64, 256], help="of the rollout")
    parser.add_argument("--generated", type=int, default=256)
    parser.add_argument("--arrangements", nargs="*", default=list(ARRANGEMENTS[:3]), choices=ARRANGEMENTS)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one group of processes")
    parser.add_argument(
        "--work", type=Path, default=Path("/tmp/qerl-bench-two"), help="where the random models are written"
    )
    parser.add_argument("--logs", type=Path, help="folder for the logs of the processes")
    parser.add_argument("--json", type=Path)
    for name in ("worker", "rank", "world", "jobs"):
        kind = {"worker": {}, "jobs": {"nargs": "*"}}.get(name, {"type": int})
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **kind)
    args = parser.parse_args()
    if args.worker:
        {"prepare": prepare, "rank": run_rank, "shards": run_shards}[args.worker](args)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    args.logs = args.logs or args.work
    args.logs.mkdir(parents=True, exist_ok=True)

    import torch

    gpu = torch.cuda.is_available()
    out = {
        "command": "python benchmarks/bench_two_gpus.py " + " ".join(sys.argv[1:]),
        "shape": args.shape,
        "small": args.small,
        "gpu": f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if gpu else "none",
        "versions": {p: version(p) for p in ("torch", "verl", "vllm", "transformers", "peft")},
    }
    parts = [part for part in MEASUREMENTS if part in args.parts]
    arrangements = args.arrangements if "main_ppo" in args.parts else []
    with ResultFile(args.json, out) as result:
        with measured(result, "prepare"):
            finish([run_here("prepare", args, environment_of())], args.timeout)
        for part in result.steps(parts):
            with measured(result, part):
                result.content[part] = found = MEASUREMENTS[part](args)
                shown = ("ratio_to_bf16_lora", "to_one_gpu")
                print(part, json.dumps(next((found[key] for key in shown if key in found), found)), flush=True)
        for name in result.steps(f"main_ppo_{arrangement}" for arrangement in arrangements):
            with measured(result, name):
                arrangement = name.removeprefix("main_ppo_")
                found = measure_main_ppo(arrangement, args)
                result.content.setdefault("main_ppo", {})[arrangement] = found
                shown = {k: v for k, v in found.items() if k not in ("command", "syncs")}
                print(arrangement, json.dumps(shown), flush=True)
    print(json.dumps({key: result.content[key] for key in ("part_s", "failed")}), flush=True)
    sys.exit(result.exit_code)


if __name__ == "__main__":
    main()
