"""Helps the engine's tests and the benchmark of two GPUs.

It makes the same batch for any number of ranks, and counts what ranks exchange.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def randomize_adapters(engine, std: float = 0.05):
    """Draws the same adapter values for every world size: for the full tensor, of which each rank
    takes its part.
    """
    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted(engine.module.named_parameters()):
        if parameter.requires_grad:
            value = (torch.randn(full(parameter).shape, generator=generator) * std).to(parameter.device)
            if isinstance(parameter, DTensor):
                parameter.data.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
            else:
                parameter.data.copy_(value)


def verl_batch(step, dp_rank=0, dp_size=1, longer=1, vocabulary=200, routing=None, **extra):
    """Returns a data-parallel rank's part of eight sequences of unequal length, as verl's trainer
    sends it.

    Args:
        longer: factor by which sequences exceed the shortest form of 10 to 17 tokens.
        vocabulary: token ids are below it.
        routing: layers, experts, and experts of a token; the batch then has random choices, none
            for the last token of a sequence.
        extra: verl's settings of a batch, such as ``use_remove_padding``.
    """
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(200 + step)
    prompts = [n * longer for n in (3, 6, 4, 5, 2, 7, 3, 4)]
    responses = [n * longer for n in (9, 4, 7, 12, 5, 3, 10, 6)]
    mine = range(8)[dp_rank * 8 // dp_size : (dp_rank + 1) * 8 // dp_size]
    ids = [torch.randint(3, vocabulary, (p + r,), generator=generator) for p, r in zip(prompts, responses)]

    def jagged(rows):
        rows = list(rows)
        return torch.nested.as_nested_tensor([rows[i] for i in mine], layout=torch.jagged)

    def drawn():
        return jagged(torch.randn(r, generator=generator) for r in responses)

    tensors = {
        "input_ids": jagged(ids),
        "position_ids": jagged(torch.arange(len(i)) for i in ids),
        "prompts": jagged(i[:p] for i, p in zip(ids, prompts)),
        "responses": jagged(i[p:] for i, p in zip(ids, prompts)),
        "loss_mask": jagged(torch.ones(r) for r in responses),
        "response_mask": jagged(torch.ones(r) for r in responses),
        "advantages": drawn(),
        "returns": drawn(),
        "values": drawn(),
        "old_log_probs": jagged(torch.randn(r, generator=generator) * 0.1 - 5 for r in responses),
    }
    if routing:
        layers, experts, top_k = routing
        scores = [torch.rand(len(i), layers, experts, generator=generator) for i in ids]
        chosen = [s.topk(top_k, -1).indices.to(torch.int16) for s in scores]
        for rows in chosen:
            rows[-1] = 0
        tensors["routed_experts"] = jagged(chosen)
    return tu.get_tensordict(tensors, {"temperature": 1.0, "global_batch_size": 8, **extra})


def image_batch(model, dp_rank=0, dp_size=1, **extra):
    """Returns a data-parallel rank's part of eight sequences with an image each, as verl's trainer
    sends it.

    Args:
        model: transformers' model, with the vision tower and without the output layer.
        extra: verl's settings of a batch.
    """
    from tensordict.tensorclass import NonTensorData, NonTensorStack
    from verl.utils import tensordict_utils as tu

    from tests.helpers.tiny_vision import image_sequences

    generator = torch.Generator().manual_seed(300)
    mine = slice(dp_rank * 8 // dp_size, (dp_rank + 1) * 8 // dp_size)
    every = [5, 4, 3, 5, 2, 3, 4, 5]
    sequences, responses = image_sequences(model.config)[mine], every[mine]

    def jagged(rows):
        return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)

    def drawn(scale=1.0, shift=0.0):
        return jagged([torch.randn(r, generator=generator) * scale + shift for r in every][mine])

    pairs = list(zip(sequences, responses, strict=True))
    tensors = {
        "input_ids": jagged(s.ids for s in sequences),
        "position_ids": torch.nested.nested_tensor_from_jagged(
            torch.cat([s.positions(model) for s in sequences], dim=1),
            torch.tensor([0, *(len(s.ids) for s in sequences)]).cumsum(0),
            jagged_dim=2,
        ),
        "prompts": jagged(s.ids[:-r] for s, r in pairs),
        "responses": jagged(s.ids[-r:] for s, r in pairs),
        "loss_mask": jagged(torch.ones(r) for r in responses),
        "response_mask": jagged(torch.ones(r) for r in responses),
        "advantages": drawn(),
        "old_log_probs": drawn(0.1, -5.0),
    }
    batch = tu.get_tensordict(tensors, {"temperature": 1.0, "global_batch_size": 8, **extra})
    images = ({"pixel_values": s.pixel_values, "image_grid_thw": s.grid} for s in sequences)
    batch["multi_modal_inputs"] = NonTensorStack(*(NonTensorData(i) for i in images))
    return batch


def loss_function(model_type: str = "language_model"):
    """Returns verl's PPO loss of an actor, or of a critic (``value_model``)."""
    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss, value_loss

    if model_type == "value_model":
        config = SimpleNamespace(cliprange_value=0.5, loss_agg_mode="token-mean", loss_scale_factor=None)
        return partial(value_loss, config=config)
    config = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=4, use_torch_compile=False)
    return partial(ppo_loss, config=config)


class _Counted(DefaultAllGather):
    def __init__(self, seen: list[int]):
        self.seen = seen

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.seen.append(output_tensor.numel() * output_tensor.element_size())
        return super().__call__(output_tensor, input_tensor, group, async_op)


def count_all_gathers(module: nn.Module) -> dict[str, list[int]]:
    """Makes every FSDP2 module record its all-gathers.

    Returns module -> bytes of the gathered tensor, one entry per call; the lists grow.
    """
    seen = {name: [] for name, part in module.named_modules() if isinstance(part, FSDPModule)}
    for name, calls in seen.items():
        module.get_submodule(name).set_custom_all_gather(_Counted(calls))
    return seen


def bytes_per_weight(layer: nn.Module, gathered: int) -> float:
    """Returns the bytes per weight that the frozen linears of a decoder layer take in its
    all-gather.

    The rest of the layer (norms, biases, the adapter) is gathered in its own dtype, or in bfloat16
    in verl's engine.

    Args:
        layer: sharded by FSDP2 as a whole.
        gathered: bytes of its all-gather.
    """
    from qerl_verl.nvfp4.linear import NVFP4Linear

    linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | NVFP4Linear) and "lora_" not in n}
    packed = any(isinstance(m, NVFP4Linear) for m in linears.values())
    weights = sum(m.in_features * m.out_features for m in linears.values())
    frozen = {id(p) for m in linears.values() for n, p in m.named_parameters(recurse=False) if n != "bias"}
    others = sum(p.numel() * (p.itemsize if packed else 2) for p in layer.parameters() if id(p) not in frozen)
    return (gathered - others) / weights


def changed_bytes(engine, checkpoint: str) -> int:
    """Returns the number of bytes of packed linears and experts that differ from the checkpoint.

    They are gathered on this rank as for a forward pass.
    """
    from qerl_verl.nvfp4.experts import NVFP4Experts
    from qerl_verl.nvfp4.linear import NVFP4Linear
    from qerl_verl.nvfp4.loading import iterate_tensors

    stored = dict(iterate_tensors(checkpoint))
    changed = 0
    for place, part in engine.module.named_modules():
        if not isinstance(part, FSDPModule) or ".layers." not in place:
            continue
        part.unshard()
        for name, linear in part.named_modules():
            if isinstance(linear, NVFP4Experts):
                name = f"{place}.{name}".removeprefix("base_model.model.")
                changed += sum(
                    int((found.view(torch.uint8) != stored[f"{name}.{kind}"].view(torch.uint8)).sum())
                    for kind, found in linear.parts().items()
                )
            if isinstance(linear, NVFP4Linear):
                name = f"{place}.{name}".removeprefix("base_model.model.").removesuffix(".base_layer")
                given = (stored[f"{name}.{kind}"].view(torch.uint8) for kind in ("weight_packed", "weight_scale"))
                expected = linear.backend.prepack(*(t.to(linear.weight_joined.device) for t in given))
                changed += sum(
                    int((found != e.view(torch.uint8)).sum())
                    for found, e in zip(linear.weight_bytes(), expected, strict=True)
                )
        part.reshard()
    return changed
