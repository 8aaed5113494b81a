"""Compares one copy of the base (qerl.base=shared) with two: memory, start, results, sleep, end.

    python benchmarks/bench_shared_base.py --shape 7B-2 --json shared_base.json     # on a GPU: under three minutes
    python benchmarks/bench_shared_base.py --shape 100M                             # on the CPU

Two real processes run as in a job, but without Ray: the actor's FSDP2 engine, and vLLM with its
worker. In each mode the engine answers the same prompts greedily with an adapter, with CUDA graphs
on a GPU, before and after a sleep. With one copy the actor is killed at the end, and the engine's
worker must end too. On a GPU a first check needs no vLLM engine: a GEMM of the Hopper kernels in a
CUDA graph of a second process, on shared memory and on a copy, with and without expandable
segments.

Memory on the CPU is PSS (a page that two processes map counts half in each) and USS (the memory of
one process alone) of the actor and of vLLM's worker. On a GPU it is what nvidia-smi reports for the
card. The exit code is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

RANK = 32
MODES = ("shared", "separate")
"""In the order in which they run. The first alone shows whether one copy works."""
PROMPTS = [list(range(5 + i, 37 + i)) for i in range(8)]
GEMM = (37888, 3584, 64)


def say(**content) -> None:
    print("RESULT " + json.dumps(content), flush=True)


def wait_for(command: str) -> None:
    """Waits for a command, so that all processes do slow imports at once and the rest one by
    one."""
    say(ready=True)
    assert listen() == command


def listen() -> str:
    return sys.stdin.readline().strip()


class Process:
    """One of this script's processes, whose answers are lines that begin with RESULT."""

    def __init__(self, role: str, arguments: list[str], environment: dict[str, str], log: Path):
        self.log = log
        log.unlink(missing_ok=True)
        self.popen = subprocess.Popen(
            [sys.executable, __file__, "--role", role, *arguments],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("a"),
            text=True,
            start_new_session=True,
        )

    def ask(self, command: str | None = None) -> dict:
        if command:
            print(command, file=self.popen.stdin, flush=True)
        with self.log.open("a") as log:
            for line in self.popen.stdout:
                if line.startswith("RESULT "):
                    return json.loads(line[7:])
                log.write(line)
        raise RuntimeError(f"{self.log.name} ended with exit code {self.popen.wait()}:\n{self.log.read_text()[-3000:]}")

    def stacks(self) -> list[str]:
        """Returns the end of the log after each process of the group has written its stacks
        there."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGUSR1)
            time.sleep(2)
        return self.log.read_text(errors="replace").splitlines()[-120:]

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()


def actor(args) -> None:
    """Builds the actor's engine as verl does."""
    begin = time.monotonic()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ["DIST_INIT_METHOD"] = f"file://{tempfile.mktemp()}"
    import torch
    import verl  # noqa: F401  (loads the plugin)
    from verl.trainer.config import CheckpointConfig
    from verl.utils.distributed import initialize_global_process_group_ray
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    imports_s = time.monotonic() - begin
    wait_for("go")
    begin = time.monotonic()

    def note(what: str) -> None:
        print(f"{time.monotonic() - begin:.1f} s: {what}", file=sys.stderr, flush=True)

    initialize_global_process_group_ray()
    note("the process group is there")
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=HFModelConfig(
            path=args.model,
            lora_rank=RANK,
            lora_alpha=RANK,
            enable_gradient_checkpointing=True,
            override_config={"attn_implementation": "sdpa"},
            use_remove_padding=False,
            load_tokenizer=False,
        ),
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, param_offload=args.offload, optimizer_offload=args.offload
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=CheckpointConfig(save_lora_only=True),
    )
    note("the engine is configured")
    engine.initialize()
    note("the engine is built")
    say(imports_s=imports_s, build_s=time.monotonic() - begin)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    while command := listen():
        if command == "memory":
            say(**memory_of([os.getpid()]))
        elif command == "train":
            torch.manual_seed(0)
            ids = torch.randint(3, 200, (4, 64), device=device)
            with engine.train_mode():
                engine.optimizer_zero_grad()
                with torch.autocast(device, torch.bfloat16):
                    logits = engine.module(input_ids=ids, use_cache=False).logits.float()
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                loss.backward()
                norm = engine.optimizer_step()
            say(loss=loss.item(), grad_norm=float(norm))


def checksum(data) -> int:
    import torch

    return int(data.view(torch.int32).sum(dtype=torch.int64))


def shared_checksum(llm) -> list[int]:
    """Returns the checksum of the actor's memory as each worker sees it."""

    def look(worker):
        import torch

        data = worker.model_runner.get_model().qerl_shared_base.data
        return int(data.view(torch.int32).sum(dtype=torch.int64))

    return llm.collective_rpc(look)


def rollout(args) -> None:
    """Starts vLLM as verl does."""
    import torch
    from vllm import LLM, SamplingParams

    import qerl_verl.rollout.worker  # noqa: F401  (vLLM's processes are forked, so they have it)
    from qerl_verl.rollout.probes import base_digest

    wait_for("go")
    on_gpu = torch.cuda.is_available()
    settings = {"enforce_eager": True}
    if on_gpu:
        settings = {
            "gpu_memory_utilization": args.utilization,
            "enable_sleep_mode": True,
            "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8]},
        }
    lora = {"rank": RANK, "alpha": RANK}
    begin = time.monotonic()
    llm = LLM(
        args.model,
        skip_tokenizer_init=True,
        distributed_executor_backend="mp",
        dtype="bfloat16",
        max_model_len=256,
        load_format=args.load_format,
        worker_extension_cls="qerl_verl.rollout.worker.QeRLWorkerExtension",
        additional_config={"qerl": {"kernel": "auto", "lora": lora, "noise": True}},
        **settings,
    )
    start_s = time.monotonic() - begin
    llm.collective_rpc("qerl_load_adapter_folder", args=(args.adapter,))
    parameters = SamplingParams(
        max_tokens=32 if on_gpu else 4, temperature=0, logprobs=0, detokenize=False, ignore_eos=True
    )

    def generate() -> list:
        llm.reset_prefix_cache()
        out = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], parameters, use_tqdm=False)
        return [
            [list(o.outputs[0].token_ids), [next(iter(p.values())).logprob for p in o.outputs[0].logprobs]] for o in out
        ]

    generate()
    begin = time.monotonic()
    outputs = generate()
    seconds = time.monotonic() - begin
    say(start_s=start_s, generate_s=seconds, outputs=outputs, digest=llm.collective_rpc(base_digest))
    while command := listen():
        if command == "memory":
            import psutil

            children = psutil.Process().children(recursive=True)
            workers = [c.pid for c in children if "Worker" in (c.name() + " ".join(c.cmdline()))]
            say(workers=workers, **memory_of(workers))
        elif command == "sleep":
            begin = time.monotonic()
            llm.sleep(level=1)
            slept = time.monotonic() - begin
            card = card_mib()
            asleep = shared_checksum(llm) if args.load_format == "qerl_shared" else None
            begin = time.monotonic()
            llm.wake_up()
            found = dict(sleep_s=slept, wake_s=time.monotonic() - begin, card_mib_asleep=card)
            say(asleep=asleep, awake=shared_checksum(llm) if asleep else None, **found)
        elif command == "again":
            say(outputs=generate(), digest=llm.collective_rpc(base_digest))


def memory_of(processes: list[int]) -> dict:
    import psutil

    infos = [psutil.Process(p).memory_full_info() for p in processes]
    mib = 1 << 20
    return {"pss_mib": sum(i.pss for i in infos) / mib, "uss_mib": sum(i.uss for i in infos) / mib}


def card_mib() -> float:
    from result_file import visible_gpu

    text = subprocess.run(
        ["nvidia-smi", "-i", visible_gpu(), "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
    ).stdout
    return float(text.split()[0])


def gemm_owner(args) -> None:
    """Puts a weight of the Hopper kernels into shared memory."""
    import torch

    from qerl_verl.kernels import hopper
    from qerl_verl.sharing.channel import BaseOwner
    from qerl_verl.sharing.layout import LayoutBuilder
    from qerl_verl.sharing.memory import SharedMemory

    wait_for("go")
    n, k, _ = GEMM
    device = torch.device("cuda", 0)
    builder = LayoutBuilder()
    builder.add_group(["gate", "up"], [n // 2, n // 2], k, "hopper")
    layout = builder.build()
    memory = SharedMemory.allocate(layout.size, device)
    torch.manual_seed(0)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    scale = torch.randint(40, 90, (n, k // 16), dtype=torch.uint8, device=device)
    for place, tensor in zip(layout.groups[0].views(memory.data), hopper.prepack(packed, scale), strict=True):
        place.copy_(tensor)
    torch.cuda.synchronize()
    owner = BaseOwner((memory, layout), args.key, 0)
    say(ready=True)
    listen()
    del owner


def gemm_user(args) -> None:
    """Runs a CUDA graph of the GEMM in the second process.

    vLLM's allocator sleeps and wakes around it.
    """
    import torch
    from vllm.device_allocator.cumem import CuMemAllocator

    from qerl_verl.kernels import hopper
    from qerl_verl.kernels.packed_weight import PackedWeight
    from qerl_verl.sharing.channel import SharedBase

    wait_for("go")
    n, k, m = GEMM
    device = torch.device("cuda", 0)
    torch.zeros(1, device=device)
    if reason := hopper.unsupported_device(0):  # compiles
        raise SystemExit(f"the Hopper kernels do not run here: {reason}")
    allocator = CuMemAllocator.get_instance()
    before = torch.cuda.mem_get_info()[0]
    with allocator.use_memory_pool(tag="weights"):
        base = SharedBase.connect(args.key, 0, device)
        own = torch.ones(32 << 20, dtype=torch.uint8, device=device)
    taken = (before - torch.cuda.mem_get_info()[0]) / 2**20
    base.watch(grace_s=0.5)
    shared = base.layout.groups[0].views(base.data)
    copies = [t.clone() for t in shared]
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)

    def graph_of(pair):
        weight = PackedWeight(*pair, 1e4)
        hopper.gemm(x, weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = hopper.gemm(x, weight)
        return graph, y

    def microseconds(graph) -> float:
        for _ in range(20):
            graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(200):
            graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) * 1000 / 200

    (ours, y), (theirs, y_copy) = graph_of(shared), graph_of(copies)
    ours.replay(), theirs.replay()
    torch.cuda.synchronize()
    equal = torch.equal(y, y_copy)
    times = microseconds(ours), microseconds(theirs)
    digest, expected = checksum(base.data), y.clone()
    allocator.sleep(offload_tags=("weights",))
    asleep = checksum(base.data) == digest
    allocator.wake_up()
    y.zero_()
    ours.replay()
    torch.cuda.synchronize()
    awake = torch.equal(y, expected) and bool((own == 1).all())
    say(equal=equal, asleep=asleep, awake=awake, shared_us=times[0], copy_us=times[1], taken_mib=taken)
    listen()


SEGMENTS = {"plain": "", "expandable": "expandable_segments:True"}
"""PyTorch's allocator in the owner. vLLM's own refuses expandable segments in its process, and verl
disables them there."""


def start_gemm(name: str, work: Path) -> tuple[Process, Process]:
    arguments, setting = ["--key", uuid.uuid4().hex], SEGMENTS[name]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": setting, "PYTORCH_ALLOC_CONF": setting} if setting else {}
    owner = Process("gemm_owner", arguments, environment, work / f"gemm_owner_{name}.log")
    return owner, Process("gemm_user", arguments, {}, work / f"gemm_user_{name}.log")


def check_gemm(owner: Process, user: Process) -> dict:
    owner.ask()
    owner.ask("go")
    user.ask()
    found = user.ask("go")
    owner.end()
    begin = time.monotonic()
    found["exit_code"] = user.popen.wait(timeout=30)
    found["ended_after_s"] = time.monotonic() - begin
    found["said"] = "the process that owns the base is gone" in user.log.read_text()
    time.sleep(1)
    found["card_mib_after"] = card_mib()
    return found


def start_mode(mode: str, args, work: Path, on_gpu: bool) -> tuple[Process, Process]:
    from qerl_verl.config.base import LOAD_FORMAT
    from qerl_verl.config.settings import QeRLSettings
    from qerl_verl.job import BaseSharing, Job, LoraSettings

    sharing = BaseSharing(uuid.uuid4().hex) if mode == "shared" else None
    settings = QeRLSettings(base="shared" if sharing else "separate")
    environment = {
        **Job(settings, LoraSettings(RANK, RANK), sharing=sharing).environment(),
        "VERL_ENGINE_VENDOR": "qerl",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VERL_REPLICA_RANK": "0",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # vLLM's processes are forked
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function is sent to the workers
    }
    if not on_gpu:
        environment |= {"VERL_PLATFORM": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    model = ["--model", str(work / args.shape)]
    offload = ["--offload"] if args.offload else []
    owner = Process("actor", [*model, *offload], environment, work / f"actor_{mode}.log")
    load_format = LOAD_FORMAT if mode == "shared" else "safetensors"
    arguments = [*model, "--adapter", str(work / "adapter"), "--load-format", load_format]
    arguments += ["--utilization", str(args.utilization)]
    return owner, Process("rollout", arguments, environment, work / f"rollout_{mode}.log")


def run_mode(mode: str, owner: Process, engine: Process, on_gpu: bool) -> dict:
    owner.ask(), engine.ask()
    before = card_mib() if on_gpu else 0.0
    found: dict = {"card_mib_before": before}
    try:
        found["actor"] = owner.ask("go")
        found["card_mib_actor"] = card_mib() - before if on_gpu else None
        found["rollout"] = engine.ask("go")
        found["train"] = owner.ask("train")
        found["actor_memory"], found["rollout_memory"] = owner.ask("memory"), engine.ask("memory")
        if on_gpu:
            found["card_mib"] = card_mib() - before
            found["sleep"] = engine.ask("sleep")
        found["again"] = engine.ask("again")
        if mode == "shared":
            found["end"] = end_of_owner(owner, found["rollout_memory"]["workers"])
    finally:
        engine.end()
        owner.end()
    if on_gpu:
        time.sleep(2)
        found["card_mib_after"] = card_mib()
    return found


def end_of_owner(owner: Process, workers: list[int]) -> dict:
    """Kills the actor and waits for vLLM's workers."""
    import psutil

    processes = [psutil.Process(w) for w in workers]
    owner.end()
    begin = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=40)
    return {"workers_ended": not alive, "after_s": time.monotonic() - begin}


def alike(one: dict, other: dict) -> bool:
    """Returns whether tokens are equal, and log-probabilities equal within a batch's rounding."""
    pairs = [
        (a, b) for x, y in zip(one["outputs"], other["outputs"], strict=True) for a, b in zip(x[1], y[1], strict=True)
    ]
    same = [x[0] for x in one["outputs"]] == [x[0] for x in other["outputs"]]
    return same and max(abs(a - b) for a, b in pairs) < 1e-2


def verdicts(found: dict) -> dict[str, bool]:
    """Returns the conditions that must hold, with their outcome."""
    separate, shared = found.get("separate"), found.get("shared")
    out = {}
    for name, gemm in found.get("gemm", {}).items():
        out[f"{name}: equal results"] = gemm["equal"] and gemm["asleep"] and gemm["awake"]
        out[f"{name}: equal speed (5 %)"] = gemm["shared_us"] < 1.05 * gemm["copy_us"]
        out[f"{name}: the second process takes no memory for it"] = gemm["taken_mib"] < 64
        out[f"{name}: the second process ends with the owner"] = gemm["exit_code"] == 1 and gemm["said"]
    if shared:
        out["the same after all"] = alike(shared["again"], shared["rollout"])
        out["the base has not changed"] = shared["again"]["digest"] == shared["rollout"]["digest"]
        out["workers end with the actor"] = shared["end"]["workers_ended"]
        if "sleep" in shared:
            out["the base stays through a sleep"] = shared["sleep"]["asleep"] == shared["sleep"]["awake"]
    if separate and shared:
        out["the same base"] = separate["rollout"]["digest"] == shared["rollout"]["digest"]
        out["the same tokens and log-probabilities"] = alike(separate["rollout"], shared["rollout"])
        out["the actor trains alike"] = separate["train"] == shared["train"]
    return out


def out_of_time(*_) -> None:
    raise TimeoutError("the time of --seconds is over")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", default="main")
    parser.add_argument("--shape", default="100M")
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--json", help="write everything that was found here")
    parser.add_argument("--work", help="folder for model and logs; a new one by default")
    parser.add_argument("--seconds", type=int, default=600, help="everything ends then (default: %(default)s)")
    parser.add_argument("--offload", action="store_true", help="the actor's param_offload and optimizer_offload")
    parser.add_argument("--utilization", type=float, default=0.3, help="the rollout's gpu_memory_utilization")
    parser.add_argument("--no-gemm", action="store_true", help="leave out the first check")
    for name in ("--model", "--adapter", "--load-format", "--key"):
        parser.add_argument(name)
    args = parser.parse_args()
    if args.role != "main":
        faulthandler.register(signal.SIGUSR1)  # forked processes inherit it
        {"actor": actor, "rollout": rollout, "gemm_owner": gemm_owner, "gemm_user": gemm_user}[args.role](args)
        return 0

    import torch
    from result_file import ResultFile
    from shapes import write_adapter, write_nvfp4

    work = Path(args.work or tempfile.mkdtemp(prefix="qerl-shared-base-"))
    work.mkdir(parents=True, exist_ok=True)
    print(f"logs: {work}", flush=True)

    def show(what: str, content: dict) -> None:
        content = {k: v for k, v in content.items() if k != "again"}
        if "rollout" in content:
            content["rollout"] = {k: v for k, v in content["rollout"].items() if k.endswith("_s")}
        print(f"{time.monotonic() - begin:.0f} s", what, json.dumps(content), flush=True)

    begin, on_gpu = time.monotonic(), torch.cuda.device_count() > 0
    signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(args.seconds)
    new: dict = {"shape": args.shape, "torch": torch.__version__}
    if on_gpu:
        new |= {"device": torch.cuda.get_device_name(0), "gemm": {}}
    segments = {f"GEMM, {name}": name for name in SEGMENTS} if on_gpu and not args.no_gemm else {}
    with ResultFile(args.json, new) as result:
        found = result.content
        for key in ("stopped", "logs"):  # of an interrupted call
            found.pop(key, None)
        pairs = {name: start_gemm(segments[name], work) for name in result.left(segments)}
        modes = {mode: start_mode(mode, args, work, on_gpu) for mode in result.left(args.modes)}
        try:
            write_nvfp4(work / args.shape, args.shape, "cpu")
            write_adapter(work / "adapter", args.shape, str(work / args.shape), "cpu")
            for name in result.steps(segments):
                found["gemm"][name] = check_gemm(*pairs[name])
                show(name, found["gemm"][name])
            for mode in result.steps(args.modes):
                found[mode] = run_mode(mode, *modes[mode], on_gpu)
                show(mode, found[mode])
        except (KeyboardInterrupt, RuntimeError, TimeoutError) as error:
            started = [process for pair in (*pairs.values(), *modes.values()) for process in pair]
            found["stopped"] = f"{type(error).__name__}: {error}"
            found["logs"] = {process.log.name: process.stacks() for process in started}
            raise
        finally:
            signal.alarm(0)
            for pair in (*pairs.values(), *modes.values()):
                for process in pair:
                    process.end()
        found["verdicts"] = verdicts(found)
    for what, holds in found["verdicts"].items():
        print(f"{'ok  ' if holds else 'FAIL'} {what}")
    return 0 if all(found["verdicts"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
