"""Runs in a process of its own, one per rank: builds the engine, trains a few steps, writes what it saw as JSON.

Usage: engine_process.py CHECKPOINT OUT RANK WORLD_SIZE PORT JSON_SETTINGS
"""

import hashlib
import json
import os
import sys

checkpoint, out, rank, world, port, settings = sys.argv[1:]
rank, world, settings = int(rank), int(world), json.loads(settings)
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
os.environ |= {"MASTER_PORT": port, "QERL_SWITCH": "nvfp4", "VERL_PLATFORM": "cpu", "VERL_ENGINE_VENDOR": "qerl"}

import torch  # noqa: E402
import verl  # noqa: E402, F401  (loads the plugin)
from torch.distributed.tensor import DTensor  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils.distributed import initialize_global_process_group_ray  # noqa: E402
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig  # noqa: E402
from verl.workers.engine import EngineRegistry  # noqa: E402

initialize_global_process_group_ray()
torch.manual_seed(0)
torch.set_num_threads(1)


def make_engine():
    model = HFModelConfig(
        path=checkpoint,
        lora_rank=settings.get("lora_rank", 8),
        lora_alpha=16,
        lora_adapter_path=settings.get("lora_adapter_path"),
        enable_gradient_checkpointing=settings.get("gradient_checkpointing", True),
        override_config={"attn_implementation": "sdpa"},
    )
    engine = EngineRegistry.new(
        model_type="language_model",
        backend="fsdp2",
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, param_offload=settings.get("offload", False)
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, lr_warmup_steps=4, total_training_steps=10),
        checkpoint_config=CheckpointConfig(
            save_contents=["model", "optimizer", "extra"],
            load_contents=["model", "optimizer", "extra"],
            save_lora_only=True,
        ),
    )
    engine.initialize()
    return engine


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def randomize_adapters(engine):
    """The same values for every world size: drawn for the full tensor, then this rank's part is taken."""
    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted(engine.module.named_parameters()):
        if parameter.requires_grad:
            value = torch.randn(full(parameter).shape, generator=generator) * 0.05
            if isinstance(parameter, DTensor):
                from torch.distributed.tensor import distribute_tensor

                parameter.data.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
            else:
                parameter.data.copy_(value)


def train_step(engine, step):
    """Eight sequences, split over the ranks; returns the loss of the whole batch."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(3, 200, (8, 12), generator=generator)
    mine = ids.chunk(world)[rank]
    with engine.train_mode():
        engine.optimizer_zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = engine.module(input_ids=mine, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten())
        loss.backward()
        grad_norm = engine.optimizer_step()
        lr = engine.lr_scheduler_step()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return {"loss": total.item() / world, "grad_norm": grad_norm, "lr": lr}


def adapter(engine):
    tensors, config = engine.get_per_tensor_param(base_sync_done=True)
    return dict(tensors), config


def digest(tensors):
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return h.hexdigest()


def memory(field):
    """Bytes, from /proc/self/status (getrusage's maximum is inherited from the parent process)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


report = {}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
before = memory("VmRSS")
engine = make_engine()
report["peak_growth"] = memory("VmHWM") - before
report["class"] = type(engine).__name__
report["parameters"] = {
    name: {
        "dtype": str(p.dtype),
        "local_bytes": (p.to_local() if isinstance(p, DTensor) else p).numel() * p.element_size(),
        "bytes": p.numel() * p.element_size(),
        "trains": p.requires_grad,
    }
    for name, p in engine.module.named_parameters()
}
if settings.get("steps"):
    if settings.get("randomize", True):
        randomize_adapters(engine)
    if settings.get("load"):
        engine.load_checkpoint(settings["load"], del_local_after_load=False)
        report["loaded"] = digest(adapter(engine)[0])
    report["steps"] = []
    for step in range(settings.get("first_step", 0), settings["steps"]):
        report["steps"].append(train_step(engine, step))
        if step + 1 == settings.get("save_after"):
            engine.save_checkpoint(settings["save"], global_step=step + 1)
            report["saved"] = digest(adapter(engine)[0])
    tensors, config = adapter(engine)
    report["adapter"] = digest(tensors)
    report["adapter_names"] = sorted(tensors)
    report["optimizer_steps"] = sorted({int(s["step"]) for s in engine.optimizer.state_dict()["state"].values()})
    torch.save(tensors, f"{out}.adapter.pt") if rank == 0 else None
with open(f"{out}.{rank}.json", "w") as file:
    json.dump(report, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
