"""Replays the routing in the actor: each token goes to the experts that the rollout chose.

Rollout and actor compute the router's input with different kernels, so a token near a tie may be
routed to other experts. vLLM returns the experts of each token (``enable_return_routed_experts``),
and verl passes them to the engine as ``routed_experts`` if
``actor_rollout_ref.rollout.enable_rollout_routing_replay`` is set
(verl/experimental/agent_loop/agent_loop.py). verl's FSDP engine does not read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

FIELD = "routed_experts"
"""The batch's field with the recorded experts: integers ``[tokens, layers, k]`` for each sequence,
zeros where nothing was recorded.
"""

SETTING = "actor_rollout_ref.rollout.enable_rollout_routing_replay"


class RoutingReplay:
    """Replaces the choices of a model's routers, and keeps the weights that the actor computes.

    The weights of the chosen experts remain the router's own softmax and remain differentiable. A
    token without a recorded choice is routed by the model: padding, and the last token of each
    sequence, which the rollout has sampled but not computed. The choices stay until the next
    micro-batch, so recomputation under activation checkpointing finds them.

    Args:
        module: transformers' model. Its routers return logits ``[T, E]``, weights ``[T, k]`` and
            indices ``[T, k]`` (Qwen3MoeTopKRouter).
        routers: their full names; the layer is the number in the name.

    Raises:
        ValueError: the model has no router, or one that chooses a single expert.
    """

    def __init__(self, module: nn.Module, routers: tuple[str, ...]):
        if not routers:
            raise ValueError(f"{SETTING}=True: the model has no experts whose routing could be replayed; remove it")
        self.layers = {int(next(filter(str.isdigit, name.split(".")))): module.get_submodule(name) for name in routers}
        self.top_k = next(iter(self.layers.values())).top_k
        if self.top_k < 2:
            raise ValueError(
                f"{SETTING}=True: the model sends a token to one expert, so a token without a "
                "recorded choice cannot be told from one that goes to expert 0; remove it"
            )
        self._chosen: torch.Tensor | None = None
        self._paused = False
        for layer, router in self.layers.items():
            router.register_forward_hook(partial(self._replace, layer))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Disables the replay within the block, for a policy that did not sample, such as the
        reference.
        """
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def begin(self, recorded: torch.Tensor | None, tokens: int) -> None:
        """Sets the choices of a micro-batch; called before its forward pass.

        Args:
            recorded: ``[tokens, layers, k]`` integers in the order of the model's input, or None
                where the batch has none.
            tokens: number of tokens of the model's input on this rank.

        Raises:
            ValueError: the batch has no choices, or choices of another model or of other tokens.
        """
        self._chosen = None
        if self._paused:
            return
        if recorded is None:
            raise ValueError(
                f"{SETTING}=True, but the batch has no {FIELD}: the rollout did not return them. "
                "Use the agent loops of verl, which carry them, or remove the setting"
            )
        found = tuple(recorded.shape)
        if len(found) != 3 or found[0] != tokens or found[1] <= max(self.layers) or found[2] != self.top_k:
            raise ValueError(
                f"{FIELD} of a micro-batch has shape {found}, but the actor has {tokens} tokens, "
                f"{max(self.layers) + 1} layers and {self.top_k} experts a token; the rollout runs "
                "another model"
            )
        self._chosen = recorded

    @contextmanager
    def replaying(self, recorded: torch.Tensor) -> Iterator[None]:
        """Replays the choices ``recorded`` within the block, see :meth:`begin`, and removes them
        after it.
        """
        self.begin(recorded, len(recorded))
        try:
            yield
        finally:
            self._chosen = None

    def _replace(self, layer: int, router: nn.Module, inputs: tuple, output: tuple) -> tuple | None:
        if self._chosen is None or self._paused:
            return None
        logits, weights, own = output
        chosen = self._chosen[:, layer].to(own.device, own.dtype)
        ordered = chosen.sort(-1).values
        recorded = (ordered[:, 1:] != ordered[:, :-1]).all(-1, keepdim=True)  # no expert twice
        chosen = torch.where(recorded, chosen, own)
        probabilities = logits.softmax(-1, dtype=torch.float).gather(-1, chosen)
        if router.norm_topk_prob:
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return logits, probabilities.to(weights.dtype), chosen


def flatten(recorded: torch.Tensor, tokens_a_row: int | None) -> torch.Tensor:
    """Returns a micro-batch's choices in the order of the model's input.

    Args:
        recorded: jagged ``[B, j, layers, k]``.
        tokens_a_row: of padded rows; None for sequences in one row.

    Returns:
        ``[tokens, layers, k]``, or ``[B * tokens_a_row, layers, k]`` with zeros behind each
        sequence.
    """
    values = recorded.values()
    if tokens_a_row is None:
        return values
    lengths = recorded.offsets().diff()
    inside = torch.arange(tokens_a_row, device=values.device)[None] < lengths[:, None]
    padded = values.new_zeros(len(lengths), tokens_a_row, *values.shape[1:])
    padded[inside] = values
    return padded.flatten(0, 1)
