"""Builds engines in a process of its own, one per rank, trains a few steps, and writes a JSON
report.

Usage: engine_process.py CHECKPOINT OUT RANK WORLD_SIZE PORT JSON_SETTINGS (as ``engine_server.py``
starts it)

With ``variants`` in the settings, several engines run one after the other through verl's own path
(train_batch, infer_batch). ``poison`` names what makes the engine stop. Otherwise one engine runs
the steps of :func:`train_step`.
"""

import hashlib
import json
import os
import sys
from dataclasses import replace
from functools import partial

checkpoint, out, rank, world, port, settings = sys.argv[1:]
rank, world, settings = int(rank), int(world), json.loads(settings)
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
os.environ |= {"MASTER_PORT": port, "VERL_PLATFORM": "cpu", "VERL_ENGINE_VENDOR": "qerl"}

import torch  # noqa: E402
import verl  # noqa: E402, F401  (loads the plugin)
from torch.distributed.tensor import DTensor  # noqa: E402
from verl.trainer.config import CheckpointConfig  # noqa: E402
from verl.utils.distributed import initialize_global_process_group_ray  # noqa: E402
from verl.workers.config import (  # noqa: E402
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
)
from verl.workers.engine import EngineRegistry  # noqa: E402
from verl.workers.engine.fsdp import FSDPEngineWithLMHead  # noqa: E402

from qerl_verl.config.rules import PACKED_ATTENTION  # noqa: E402
from qerl_verl.engine.compile import CompiledMLP  # noqa: E402
from qerl_verl.engine.register import engine_class  # noqa: E402
from qerl_verl.job import this_job  # noqa: E402
from qerl_verl.lora.wire import CONFIG_TENSOR, pack_config  # noqa: E402
from tests.engine.many_ranks import (  # noqa: E402
    bytes_per_weight,
    changed_bytes,
    count_all_gathers,
    full,
    image_batch,
    loss_function,
    randomize_adapters,
    verl_batch,
)

initialize_global_process_group_ray()
torch.manual_seed(0)
torch.set_num_threads(1)


def make_engine(**variant):
    """Builds an engine: with ``stock``, the folder of a 16-bit checkpoint, verl's own; with
    ``arm``, that arm's on ``base``.
    """
    get = {**settings, **variant}.get
    model_type = get("model_type", "language_model")
    job = this_job()
    settings_of = replace(job.settings, recompute=get("recompute", "full"))
    job = replace(job, settings=settings_of, replay=get("replay", False))
    os.environ.update(job.environment())
    os.environ["TORCH_COMPILE_DISABLE"] = "1" if get("no_compiling") else "0"
    model = HFModelConfig(
        path=get("stock") or get("base", checkpoint),
        model_type=model_type,
        lora_rank=get("lora_rank", 8),
        lora_alpha=16,
        lora_adapter_path=get("lora_adapter_path"),
        target_modules=get("target_modules", "all-linear"),
        enable_gradient_checkpointing=get("gradient_checkpointing", True),
        override_config={"attn_implementation": PACKED_ATTENTION if get("packed_attention") else "sdpa"},
        use_remove_padding=get("use_remove_padding", False),
        use_fused_kernels=get("use_fused_kernels", False),
    )
    new = FSDPEngineWithLMHead if get("stock") else partial(EngineRegistry.new, model_type=model_type, backend="fsdp2")
    if get("arm"):
        new = engine_class(get("arm"), model_type)
    engine = new(
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2",
            model_dtype="bfloat16",  # verl's engine alone reads it
            use_torch_compile=get("use_torch_compile", False),
            param_offload=get("param_offload", False),
            optimizer_offload=get("optimizer_offload", False),
            offload_policy=get("offload_policy", False),
            mixed_precision=get("mixed_precision"),
            ulysses_sequence_parallel_size=get("ulysses", 1),
            fsdp_size=get("fsdp_size", -1),
        ),
        optimizer_config=FSDPOptimizerConfig(
            lr=1e-2, lr_warmup_steps=get("lr_warmup_steps", 4), total_training_steps=10
        ),
        checkpoint_config=CheckpointConfig(
            save_contents=["model", "optimizer", "extra"],
            load_contents=["model", "optimizer", "extra"],
            save_lora_only=True,
        ),
    )
    engine.initialize()
    return engine


def train_step(engine, step):
    """Trains on eight sequences, split over the ranks, and returns the loss of the whole batch."""
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(3, 200, (8, 12), generator=generator)
    mine = ids.chunk(world)[rank]
    with engine.train_mode():
        engine.optimizer_zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = engine.module(input_ids=mine, use_cache=False).logits.float()
        if logits.shape[-1] == 1:  # values
            loss = (logits.squeeze(-1) - mine / 200).square().mean()
        else:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten())
        loss.backward()
        grad_norm = engine.optimizer_step()
        lr = engine.lr_scheduler_step()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    return {"loss": total.item() / world, "grad_norm": grad_norm, "lr": lr}


def run_variant(name, variant):
    """Runs two steps of verl's train_batch; with ``reference``, log-probabilities without the
    adapter precede each.
    """
    engine = make_engine(**variant)
    seen = {"fresh": infer(engine, **variant)} if variant.get("reference") else {}
    seen |= {"class": type(engine).__name__, "built": digest(adapter(engine)[0])}
    with engine.train_mode():
        randomize_adapters(engine)
    keep(adapter(engine)[0], "start")
    seen |= {"loss": [], "grad_norm": []}
    modules = list(engine.module.modules())
    seen["compiled"] = {
        "norms": sum(module._compiled_call_impl is not None for module in modules),
        "mlps": sum(isinstance(module, CompiledMLP) for module in modules),
        "entropy": hasattr(engine.compute_entropy_from_logits, "_torchdynamo_orig_callable"),
    }
    gathers = count_all_gathers(engine.module) if variant.get("count") else {}
    for step in range(variant.get("steps", 2)):
        if variant.get("reference"):
            with engine.disable_adapter():
                seen["without"] = infer(engine, **variant)
            seen["with"] = infer(engine, **variant)
        ranks = engine.get_data_parallel_rank(), engine.get_data_parallel_size()
        how = {
            "use_remove_padding": variant.get("use_remove_padding", False),
            "use_fused_kernels": variant.get("use_fused_kernels", False),
            "use_dynamic_bsz": variant.get("use_dynamic_bsz", False),
            "max_token_len_per_gpu": 32,
            "micro_batch_size_per_gpu": min(4, 8 // engine.get_data_parallel_size()),
        }
        if variant.get("images"):
            data = image_batch(engine.module.get_base_model().model, *ranks, **how)
        else:
            data = verl_batch(step, *ranks, routing=variant.get("routing"), **how)
        with engine.train_mode():
            output = engine.train_batch(data, loss_function(settings.get("model_type")))
            engine.lr_scheduler_step()
            if step == 0:
                trained = ((n, p.grad) for n, p in engine.module.named_parameters() if p.requires_grad)
                keep({n: full(grad).clone() for n, grad in trained}, f"{name}_grad")
        loss = torch.tensor(sum(output["loss"]), dtype=torch.float64)
        torch.distributed.all_reduce(loss)
        seen["loss"].append(loss.item() / world)
        seen["micro_batches"] = len(output["loss"])
        seen["grad_norm"].append(
            output["metrics"].get("grad_norm")
        )  # of a sequence-parallel group its first rank alone
    tensors, config = engine.get_per_tensor_param(
        base_sync_done=True, layered_summon=variant.get("layered_summon", False)
    )
    tensors, seen["peft_config"] = dict(tensors), pack_config(config).tolist()
    # as a checkpoint engine gets it
    if settings.get("model_type") != "value_model" and not variant.get("stock"):
        *sent, (last, packed) = engine.get_per_tensor_param()[0]
        assert last == CONFIG_TENSOR and packed.tolist() == seen["peft_config"]
        assert all(torch.equal(tensor, tensors[n]) for n, tensor in sent) and len(sent) == len(tensors)
    keep(tensors, name)
    for place, calls in gathers.items():
        if ".layers." in place:
            layer = engine.module.get_submodule(place)
            seen.setdefault("bytes_per_weight", []).extend(bytes_per_weight(layer, size) for size in calls)
    if variant.get("count") and not variant.get("stock"):
        seen["changed_bytes"] = changed_bytes(engine, checkpoint)
    if variant.get("save"):
        engine.save_checkpoint(variant["save"], global_step=1)
    if variant.get("load"):
        engine.load_checkpoint(variant["load"], del_local_after_load=False)
        seen["loaded"] = digest(adapter(engine)[0])
    return seen | {"adapter": digest(tensors)}


def keep(tensors, name):
    """Stores values for the test."""
    if rank == 0:
        torch.save(tensors, f"{out}.{name}.pt")


def infer(engine, images=False, use_remove_padding=False, use_fused_kernels=False, routing=None, **variant):
    """Returns log-probabilities or values of step 0's batch as a flat list.

    The sequences have ``images`` if the variant computes with them.
    """
    how = {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": 8}
    if images:
        how |= {"use_remove_padding": use_remove_padding, "use_fused_kernels": use_fused_kernels}
        data = image_batch(engine.module.get_base_model().model, **how)
    else:
        data = verl_batch(0, use_remove_padding=False, routing=routing, **how)
    with engine.eval_mode():
        output = engine.infer_batch(data)["model_output"]
    return output["values" if "values" in output else "log_probs"].values().float().tolist()


def poisoned(what):
    """Returns the error of an engine whose ``what`` is not finite, and whether the weights are
    unchanged.
    """
    engine = make_engine()
    randomize_adapters(engine)
    engine.lr_scheduler_step()
    engine.lr_scheduler_step()
    before = digest(adapter(engine)[0])
    batch = {"use_remove_padding": False, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 4}
    parameters = dict(engine.module.named_parameters())
    name = next(n for n in parameters if "layers.1.self_attn.q_proj.lora_A" in n)
    try:
        if what == "loss":
            data = verl_batch(0, **batch)
            data["returns" if settings.get("model_type") == "value_model" else "advantages"].values()[40] = float("nan")
            with engine.train_mode():
                engine.train_batch(data, loss_function(settings.get("model_type")))
        elif what == "gradient":  # of one rank alone
            with engine.train_mode():
                engine.optimizer_zero_grad()
                engine.forward_backward_batch(verl_batch(0, **batch), loss_function(settings.get("model_type")))
                if rank == world - 1:
                    parameters[name].grad.to_local()[0, 0] = float("inf")
                engine.optimizer_step()
        else:
            parameters[name].data.to_local()[0, 0] = float("nan")
            if what == "sync":
                engine.get_per_tensor_param(base_sync_done=True)
            else:
                engine.save_checkpoint(settings["save"], global_step=1)
    except ArithmeticError as error:
        unchanged = what in ("sync", "save") or digest(adapter(engine)[0]) == before
        return {"error": f"{type(error).__name__}: {error}", "unchanged": unchanged}
    return {"error": None}


def adapter(engine):
    tensors, config = engine.get_per_tensor_param(base_sync_done=True)
    return dict(tensors), config


def digest(tensors):
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].detach().float().contiguous().numpy().tobytes())
    return h.hexdigest()


def memory(field):
    """Returns bytes from /proc/self/status, because getrusage's maximum is inherited from the
    parent process.
    """
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def run_steps():
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
    report["built"] = digest(adapter(engine)[0])
    if settings.get("steps"):
        if settings.get("randomize", True):
            randomize_adapters(engine)
        if settings.get("refused"):
            try:
                engine.load_checkpoint(settings["refused"], del_local_after_load=False)
            except Exception as error:
                report["refused"] = f"{type(error).__name__}: {error}"
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
    return report


if settings.get("variants"):
    report = {name: run_variant(name, variant) for name, variant in settings["variants"].items()}
elif settings.get("poison"):
    report = {what: poisoned(what) for what in settings["poison"]}
else:
    report = run_steps()
with open(f"{out}.{rank}.json", "w") as file:
    json.dump(report, file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
