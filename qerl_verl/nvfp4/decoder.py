"""Runs a checkpoint's decoder one layer at a time.

Memory holds one layer and the activations between two layers. The layers are transformers' own
modules. Rotary embeddings, masks and the other arguments of a layer come from the model class: its
forward pass runs once for each batch, with recorders in the places of the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qerl_verl.nvfp4.architectures import Architecture, automatic_class, get_architecture, logits_divisor
from qerl_verl.nvfp4.safetensors_stream import TensorInfo, read_tensor

_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_SCORED_TOKENS = 512  # tokens that go through the output layer at a time


@dataclass
class Activations:
    """Activations between two decoder layers, for a batch of sequences with padding at their ends.

    Attributes:
        hidden: ``[batch, length, hidden_size]``.
        inside: ``[batch, length]`` bool, False at padding. Attention is causal, so no token sees
            the padding.
        tokens: ``[batch, length]`` int64.
        scored: ``[batch, length]`` bool, positions whose next token counts in the loss.
        calls: for each layer, the keyword arguments that the model class passes to it.
    """

    hidden: torch.Tensor
    inside: torch.Tensor
    tokens: torch.Tensor
    scored: torch.Tensor
    calls: list[dict[str, Any]]

    def advance(self, layer: nn.Module, index: int) -> None:
        """Passes the activations through a decoder layer, in place."""
        output = layer(self.hidden, **self.calls[index])
        self.hidden = output[0] if isinstance(output, tuple) else output

    def copy(self) -> Activations:
        """Returns a copy that can go through other layers."""
        return Activations(self.hidden, self.inside, self.tokens, self.scored, self.calls)


class _Recorder(nn.Module):
    """Stands in the place of a layer, records how it is called and returns its input."""

    def __init__(self, calls: list[dict[str, Any]], inputs: list[torch.Tensor]):
        super().__init__()
        self._calls, self._inputs = calls, inputs

    def forward(self, hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self._calls.append(arguments)
        self._inputs.append(hidden)
        return hidden


class SeparateExperts(nn.Module):
    """The experts of a layer as separate linears with the checkpoint's names.

    transformers holds them as 3-D parameters. Expert ``E`` is ``self.get_submodule(f"{E}")`` with
    ``gate_proj``, ``up_proj`` and ``down_proj``.

    Attributes:
        chosen: ``[tokens of the expert]`` int64 while an expert runs: the indices of its tokens
            among the layer's tokens.

    Args:
        experts: transformers' module, on the meta device.
        config: transformers' configuration of the model.
        row: the model's row of the table of architectures.
    """

    def __init__(self, experts: nn.Module, config: Any, row: Architecture):
        super().__init__()
        assert row.experts is not None
        dtype, hidden, inner = experts.down_proj.dtype, config.hidden_size, getattr(config, row.experts.inner)
        self._count = getattr(config, row.experts.count)
        self._act = experts.act_fn
        self.chosen: torch.Tensor | None = None
        for expert in range(self._count):
            shapes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
            linears = {n: nn.Linear(*shape, bias=False, dtype=dtype, device="meta") for n, shape in shapes.items()}
            self.add_module(str(expert), nn.ModuleDict(linears))

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Computes what transformers' experts compute (Qwen3MoeExperts).

        Args:
            hidden: ``[tokens, hidden_size]``.
            indices, weights: ``[tokens, experts of a token]``, from the router.

        Returns:
            ``[tokens, hidden_size]``.
        """
        out = torch.zeros_like(hidden)
        for index in range(self._count):
            self.chosen, place = torch.where(indices == index)
            if not len(self.chosen):
                continue
            expert, x = self.get_submodule(str(index)), hidden[self.chosen]
            x = expert["down_proj"](self._act(expert["gate_proj"](x)) * expert["up_proj"](x))
            out.index_add_(0, self.chosen, (x * weights[self.chosen, place, None]).to(out.dtype))
        self.chosen = None
        return out


class LayerwiseDecoder:
    """A causal language model that loads the weights of a layer from the checkpoint on demand.

    Args:
        config: transformers' configuration of the model.
        tensors: name -> location of the checkpoint's tensors, with one matrix for each linear of an
            expert.
        device: where to compute. A CPU computes in float32, because bfloat16 can be fifty times
            slower there; other devices compute in the checkpoint's dtype.
    """

    def __init__(self, config: Any, tensors: dict[str, TensorInfo], device: torch.device):
        from accelerate import init_empty_weights

        self._tensors, self.device = tensors, device
        row = self._row = get_architecture(config)
        self._prefix = row.layer_prefix
        half = torch.float16 if tensors[row.embeddings].dtype == "F16" else torch.bfloat16
        self.dtype = torch.float32 if device.type == "cpu" else half
        with init_empty_weights(include_buffers=False):
            automatic = automatic_class(self._row)
            model = automatic.from_config(config, dtype=self.dtype, attn_implementation="sdpa")
        model.eval().requires_grad_(False)
        self._model = model.get_submodule(self._row.decoder.rstrip("."))
        self._layers = list(model.get_submodule(self._prefix.rstrip(".")))
        for index, layer in enumerate(self._layers):
            if row.experts is not None and row.has_experts(config, index):
                parent, _, leaf = row.experts.module.rpartition(".")
                separate = SeparateExperts(layer.get_submodule(row.experts.module), config, row)
                setattr(layer.get_submodule(parent), leaf, separate.requires_grad_(False))
        self._norm = self._model.norm
        self._model.norm = nn.Identity()
        self._divisor = logits_divisor(config)
        self._head = self._row.embeddings if config.tie_word_embeddings else "lm_head.weight"
        for buffer_owner in (m for name, m in self._model.named_children() if name not in ("layers", "embed_tokens")):
            buffer_owner.to(device)
        # concerns gradients only, and would have to be one of the rows in use
        self._model.embed_tokens.padding_idx = None

    def __len__(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def embed(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[Activations]:
        """Returns the input of the first layer, in batches of sequences of similar length.

        Args:
            sequences: token ids, and how many leading tokens are not scored (the prompt).
        """
        table = read_tensor(self._tensors[self._row.embeddings])
        batches = []
        for batch in _by_length(sequences, _BATCH_TOKENS[self.device.type]):
            lengths = torch.tensor([len(ids) for ids, _ in batch])
            place = torch.arange(int(lengths.max())).expand(len(batch), -1)
            tokens = torch.zeros(place.shape, dtype=torch.int64)
            for row, (ids, _) in enumerate(batch):
                tokens[row, : len(ids)] = torch.tensor(ids)
            inside = place < lengths[:, None]
            unscored = torch.tensor([max(begin, 1) for _, begin in batch])[:, None]
            scored = (place >= unscored - 1) & (place < lengths[:, None] - 1)
            calls: list[dict[str, Any]] = []
            inputs: list[torch.Tensor] = []
            self._model.layers = nn.ModuleList(_Recorder(calls, inputs) for _ in self._layers)
            self._model(inputs_embeds=self._embed(table, tokens), use_cache=False)
            inside, tokens, scored = (t.to(self.device) for t in (inside, tokens, scored))
            batches.append(Activations(inputs[0], inside, tokens, scored, calls))
        return batches

    def _embed(self, table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings of tokens by the model's own module.

        Gemma's module does more than look up a row of the table.
        """
        used, place = tokens.unique(return_inverse=True)
        rows = table[used].to(self.device, self.dtype)
        return torch.func.functional_call(self._model.embed_tokens, {"weight": rows}, (place.to(self.device),))

    def load_layer(self, index: int) -> nn.Module:
        """Loads the weights of a decoder layer onto the device and returns it.

        :meth:`drop_layer` frees them.
        """
        layer, prefix = self._layers[index], f"{self._prefix}{index}."
        state = {}
        for name in layer.state_dict():
            state[name] = read_tensor(self._tensors[f"{prefix}{name}"]).to(self.device, self.dtype)
        layer.load_state_dict(state, assign=True)
        return layer

    def drop_layer(self, index: int) -> None:
        self._layers[index].to("meta")

    @torch.no_grad()
    def compare(self, ours: list[Activations], reference: list[Activations]) -> dict[str, float]:
        """Compares predictions with a reference on the scored tokens, both after the last layer.

        Returns:
            ``tokens``, their number; ``loss`` and ``entropy`` of ``ours``, ``reference_loss``, and
            ``kl``, the mean of KL(reference || ours), all in nats per token.
        """
        weight = read_tensor(self._tensors[f"{self._row.decoder}norm.weight"]).to(self.device, self.dtype)
        self._norm.load_state_dict({"weight": weight}, assign=True)
        head = read_tensor(self._tensors[self._head]).to(self.device, self.dtype)
        names = ("tokens", "loss", "entropy", "reference_loss", "kl")
        total = dict.fromkeys(names, 0.0)
        for mine, other in zip(ours, reference, strict=True):
            next_tokens = mine.tokens.roll(-1, 1)[mine.scored]
            for target, a, b in zip(
                *(t.split(_SCORED_TOKENS) for t in (next_tokens, mine.hidden[mine.scored], other.hidden[other.scored])),
                strict=True,
            ):
                p, q = (F.linear(self._norm(x), head).float().div(self._divisor).log_softmax(-1) for x in (a, b))
                values = (
                    torch.ones_like(target),
                    -p.gather(-1, target[:, None]),
                    -(p.exp() * p).sum(-1),
                    -q.gather(-1, target[:, None]),
                    (q.exp() * (q - p)).sum(-1),
                )
                for name, value in zip(names, values, strict=True):
                    total[name] += value.double().sum().item()
        count = total.pop("tokens")
        return {"tokens": int(count), **{name: value / max(count, 1) for name, value in total.items()}}


def _by_length(
    sequences: Sequence[tuple[Sequence[int], int]], batch_tokens: int
) -> Iterator[list[tuple[Sequence[int], int]]]:
    """Yields batches of at most ``batch_tokens`` tokens with padding, longest sequences first.

    A longer sequence is a batch of its own.
    """
    batch: list[tuple[Sequence[int], int]] = []
    for sequence in sorted(sequences, key=lambda s: len(s[0]), reverse=True):
        if batch and (len(batch) + 1) * len(batch[0][0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch
