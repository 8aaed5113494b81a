"""Log-probabilities and entropies of an output layer, without all tokens' logits at once.

With the logits ``z = h W^T / temperature`` of a token and its label ``y``:

    log p = z_y - logsumexp(z)        entropy = logsumexp(z) - sum_v softmax(z)_v z_v

:func:`linear_logprobs_reference` writes that down; :func:`linear_logprobs` computes it for some
tokens at a time, forward and backward, and keeps nothing of the size of the vocabulary in between.
The weight is frozen: it gets no gradient.
"""

from __future__ import annotations

import torch

CHUNK_BYTES = 512 << 20
"""Size in bytes of the float32 logits that exist at a time."""


def linear_logprobs_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes :func:`linear_logprobs` with the logits of all tokens in float32."""
    logits = (hidden @ weight.t()).float() / temperature
    log_p = logits.log_softmax(-1)
    chosen = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_p.exp() * log_p).sum(-1)


def chunk_size(vocabulary: int) -> int:
    """Returns the number of tokens whose logits are computed at a time."""
    return max(64, CHUNK_BYTES // (4 * vocabulary) // 64 * 64)


class _LinearLogprobs(torch.autograd.Function):
    """Saves ``hidden``, the weight, the labels and two numbers per token."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature):
        ctx.set_materialize_grads(False)
        tokens = hidden.shape[0]
        chosen, entropy, log_sum = (torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(3))
        step = chunk_size(weight.shape[0])
        for begin in range(0, tokens, step):
            part = slice(begin, begin + step)
            logits = (hidden[part] @ weight.t()).float().div_(temperature)
            torch.logsumexp(logits, -1, out=log_sum[part])
            chosen[part] = logits.gather(-1, labels[part, None]).squeeze(-1) - log_sum[part]
            log_p = logits.sub_(log_sum[part, None])
            entropy[part] = -torch.linalg.vecdot(log_p.exp(), log_p)
        ctx.save_for_backward(hidden, weight, labels, log_sum, entropy)
        ctx.temperature = temperature
        return chosen, entropy

    @staticmethod
    def backward(ctx, grad_chosen, grad_entropy):
        hidden, weight, labels, log_sum, entropy = ctx.saved_tensors
        if not ctx.needs_input_grad[0] or (grad_chosen is None and grad_entropy is None):
            return None, None, None, None
        grad_hidden = torch.empty_like(hidden)
        step = chunk_size(weight.shape[0])
        for begin in range(0, hidden.shape[0], step):
            part = slice(begin, begin + step)
            log_p = (hidden[part] @ weight.t()).float().div_(ctx.temperature).sub_(log_sum[part, None])
            if grad_entropy is None:
                grad = log_p.exp_().mul_(-grad_chosen[part, None])
            else:
                # d entropy / d z_v = -p_v (log p_v + entropy), d log p / d z_v = 1[v = y] - p_v
                p = log_p.exp()
                grad = log_p.add_(entropy[part, None]).mul_(grad_entropy[part, None])
                if grad_chosen is not None:
                    grad.add_(grad_chosen[part, None])
                grad.mul_(p).neg_()
            if grad_chosen is not None:
                grad.scatter_add_(-1, labels[part, None], grad_chosen[part, None])
            grad_hidden[part] = grad.div_(ctx.temperature).to(hidden.dtype) @ weight
        return grad_hidden, None, None, None


def linear_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probability of each label and the entropy of each distribution.
    The result is differentiable in ``hidden``.

    Args:
        hidden: ``[..., hidden_size]``, the input of the output layer.
        weight: ``[vocabulary, hidden_size]`` in ``hidden.dtype``, frozen.
        labels: ``[...]`` integers.
        temperature: above 0.

    Returns:
        Two tensors ``[...]`` in float32, entropy in nats.

    Raises:
        ValueError: the shapes do not fit together, or the weight requires a gradient.
    """
    if labels.shape != hidden.shape[:-1] or weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(
            f"hidden {list(hidden.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} do not fit together"
        )
    if weight.requires_grad:
        raise ValueError("the output layer has to be frozen: its weight would get no gradient")
    rows = hidden.reshape(-1, hidden.shape[-1])
    outputs = _LinearLogprobs.apply(rows, weight, labels.reshape(-1).long(), float(temperature))
    return tuple(output.view(labels.shape) for output in outputs)
