"""Provides an output layer that returns log-probabilities and entropies instead of logits (verl's
``use_fused_kernels``).

verl's own fused kernels read the output layer's weight without calling the layer, so FSDP2 does not
gather one that is sharded by itself (verl/utils/fsdp_utils.py, _select_fsdp2_wrap_targets;
verl/models/transformers/dense_common.py), and they compute a gradient of the weight, which is
frozen here. This layer is called, and computes none.
"""

from __future__ import annotations

import types

import torch
from torch import nn
from verl.models.transformers.dense_common import CausalLMOutputForPPO

from qerl_verl.kernels.linear_logprobs import linear_logprobs
from qerl_verl.nvfp4.architectures import logits_divisor


class LogprobLinear(nn.Linear):
    """A frozen output layer without bias; with labels it returns log-probabilities and
    entropies."""

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None, temperature: float = 1.0):
        """Returns logits ``[..., vocabulary]``; with ``labels`` ``[...]``, see
        :func:`~.linear_logprobs.linear_logprobs`.
        """
        if labels is None:
            return super().forward(hidden)
        return linear_logprobs(hidden.to(self.weight.dtype), self.weight, labels, temperature)


def use_logprob_layer(model: nn.Module) -> None:
    """Gives a causal language model an output layer that verl's ``use_fused_kernels`` path can
    call.

    Args:
        model: a transformers model whose ``model`` is the decoder and whose ``lm_head`` is a linear
            without bias.

    Raises:
        ValueError: the model has no such output layer, or does more with its logits than to divide
            them.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or head is not getattr(model, "lm_head", None):
        raise ValueError(
            f"use_fused_kernels=True: {type(model).__name__} has no plain linear output layer; remove the setting"
        )
    if getattr(model.config, "final_logit_softcapping", None) is not None:
        raise ValueError(
            f"use_fused_kernels=True: {type(model).__name__} caps its logits "
            "(final_logit_softcapping in config.json), which the output layer does not; remove "
            "the setting"
        )
    divisor = logits_divisor(model.config)
    head.__class__ = LogprobLinear
    stock = model.forward

    def forward(self, *args, temperature: float | None = None, shift_labels: torch.Tensor | None = None, **kwargs):
        """Runs the model's own forward pass. With ``temperature``, as verl calls it, returns
        log-probabilities and entropies (verl/workers/engine/fsdp/transformer_impl.py,
        prepare_model_inputs). Without ``shift_labels`` ``[batch, tokens]``, the label of each token
        is the next of ``input_ids``.
        """
        if temperature is None:
            return stock(*args, **kwargs)
        kwargs.pop("return_dict", None)
        labels = torch.roll(kwargs["input_ids"], shifts=-1, dims=-1) if shift_labels is None else shift_labels
        output = self.model(*args, **kwargs)
        log_probs, entropy = self.lm_head(output.last_hidden_state, labels=labels, temperature=temperature * divisor)
        return CausalLMOutputForPPO(log_probs=log_probs, entropy=entropy, past_key_values=output.past_key_values)

    model.forward = types.MethodType(forward, model)
