"""Names the adapters on the experts of a mixture: one for each linear, and stacked.

A file has a pair for each linear of each expert, as for any other layer:
``{module}.{expert}.gate_proj.lora_A.weight`` ``[r, K]`` and ``lora_B.weight`` ``[N, r]``. PEFT
takes such a file for its 3-D parameters (peft/utils/transformers_weight_conversion.py), and vLLM
for its fused layer (vllm/lora/lora_weights.py, PackedLoRALayerWeights.pack_moe).

In the actor, and on the way to the rollout, the experts of a layer are four tensors:
``{module}.lora_A.gate_up_proj`` ``[E, 2 r, H]``, ``lora_B.gate_up_proj`` ``[E, 2 I, r]``,
``lora_A.down_proj`` ``[E, r, I]`` and ``lora_B.down_proj`` ``[E, H, r]``. Rows of gate precede rows
of up.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from qerl_verl.nvfp4.architectures import EXPERT_LINEARS as PROJECTIONS
from qerl_verl.nvfp4.architectures import EXPERT_STACKS as STACKS

if TYPE_CHECKING:
    import torch

MODULE = "experts"
"""Last name of the module that holds a layer's experts, which PEFT is told to adapt."""

_LINEAR = re.compile(rf"\.{MODULE}\.\d+\.(?:{'|'.join(PROJECTIONS)})$")
_ONE = re.compile(
    rf"^(?P<module>.+\.{MODULE})\.(?P<expert>\d+)\.(?P<projection>{'|'.join(PROJECTIONS)})\.lora_(?P<part>[AB])\.weight$"
)
_STACKED = re.compile(rf"^(?P<module>.+\.{MODULE})\.lora_(?P<part>[AB])\.(?P<stack>{'|'.join(STACKS)})$")


def is_of_experts(linear: str) -> bool:
    """Returns whether a linear belongs to an expert, by its full name."""
    return _LINEAR.search(linear) is not None


def parse_stacked(name: str) -> tuple[str, str, str] | None:
    """Returns module, ``A`` or ``B``, and stack of a stacked tensor's name, or None for other
    names.
    """
    match = _STACKED.match(name)
    return match and (match["module"], match["part"], match["stack"])


def partial_problem(layers: Collection[str], adapted: Collection[str]) -> str | None:
    """Returns why an adapter on only some of the experts' linears cannot be trained or loaded.

    The result is None where all linears have an adapter, or none.

    Args:
        layers: full names of the linears that can have an adapter.
        adapted: full names of the linears that have one.
    """
    every = {name for name in layers if is_of_experts(name)}
    found = every & set(adapted)
    if found in (set(), every):
        return None
    return (
        f"{len(found)} of the {len(every)} linears of the experts would have an adapter, but they "
        f"get one together: name {', '.join(PROJECTIONS)}, without excluding any, or none of them"
    )


def stack_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stacks an adapter's tensors of each layer's experts; other tensors stay as they are.

    Args:
        tensors: PEFT's name, with or without its prefix -> tensor.

    Raises:
        ValueError: an expert lacks a tensor, or its shape differs from the first expert's.
    """
    import torch

    out: dict[str, torch.Tensor] = {}
    found: dict[tuple[str, str], dict[tuple[int, str], torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _ONE.match(name):
            place = found.setdefault((match["module"], match["part"]), {})
            place[int(match["expert"]), match["projection"]] = tensor
        else:
            out[name] = tensor
    for (module, part), pieces in found.items():
        count = 1 + max(expert for expert, _ in pieces)
        for stack, projections in STACKS.items():
            rows = []
            for expert in range(count):
                for projection in projections:
                    piece, first = pieces.get((expert, projection)), pieces.get((0, projection))
                    if piece is None or first is None or piece.shape != first.shape:
                        raise ValueError(
                            f"{module}.{expert}.{projection}.lora_{part} is missing, or has "
                            f"another shape than the first expert's; the {count} experts of a "
                            "layer get their adapter together"
                        )
                    rows.append(piece)
            out[f"{module}.lora_{part}.{stack}"] = torch.cat(rows).view(count, -1, rows[0].shape[-1])
    return out


def split_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits stacked tensors in the order of the experts, as the inverse of :func:`stack_experts`.

    The results are views.
    """
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if (parsed := parse_stacked(name)) is None:
            out[name] = tensor
            continue
        module, part, stack = parsed
        for expert, rows in enumerate(tensor):
            for projection, piece in zip(STACKS[stack], rows.chunk(len(STACKS[stack])), strict=True):
                out[f"{module}.{expert}.{projection}.lora_{part}.weight"] = piece
    return out


def module_targets(targets: Any) -> Any:
    """Returns ``target_modules`` for PEFT in the actor.

    The module of the experts replaces the names of their linears, which PEFT would take for
    transformers' 3-D parameters.
    """
    if isinstance(targets, str) or not set(targets) & set(PROJECTIONS):
        return targets
    return sorted({name for name in targets if name not in PROJECTIONS} | {MODULE})


def linear_targets(targets: Any) -> Any:
    """Returns ``target_modules`` for a file and for the rollout, as the inverse of
    :func:`module_targets`.
    """
    if isinstance(targets, str) or MODULE not in targets:
        return targets
    return sorted({name for name in targets if name != MODULE} | set(PROJECTIONS))


def adapts_experts(targets: Any) -> bool:
    """Returns whether ``target_modules`` name linears of experts, in a model that has experts."""
    return isinstance(targets, Iterable) and not isinstance(targets, str) and bool(set(targets) & set(PROJECTIONS))
