"""A Qwen2 model small enough to train on two cores, made on the spot.

``make_tiny_model`` builds the tokenizer and the network, gives it a short supervised start on the quickstart's
arithmetic and saves a Hugging Face checkpoint. The start is cut short on purpose: reinforcement learning needs answers
that are sometimes right and sometimes wrong.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from qerl_verl.quickstart.arithmetic import Problem

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WHOLE_WORDS = ("system", "user", "assistant")
"""Role names: one token each, so that a prompt stays short."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The network. Input sizes are multiples of 128, which every NVFP4 kernel can take, not only of the block of 16."""

    hidden: int = 128
    intermediate: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 320
    positions: int = 256


@dataclass(frozen=True)
class SupervisedStart:
    """The supervised start. ``steps`` sets how good the model is before reinforcement learning."""

    steps: int = 320
    batch: int = 128
    lr: float = 3e-3
    warmup: int = 20


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with ChatML: 256 bytes, merges that make the role names one token each, three marks.

    It is byte-level because ``AutoTokenizer`` rebuilds the tokenizer of a ``qwen2`` model from its vocabulary and merges
    with Qwen's own pre-tokenizer, and because verl asks that a newline be one token.
    """
    tokens = [END_OF_TEXT, TURN_START, TURN_END, *sorted(ByteLevel.alphabet())]
    merges: list[tuple[str, str]] = []
    for word in WHOLE_WORDS:
        for end in range(1, len(word)):
            merge = (word[:end], word[end])
            if merge not in merges:
                merges.append(merge)
                tokens.append("".join(merge))
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _encode(
    problems: Sequence[Problem], tokenizer: Qwen2Tokenizer, prompt_of: Callable[[Problem], list[dict[str, str]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids`` and ``labels``, both ``[problem, position]``; only the answer and the end of the turn are labels."""
    prompts = [tokenizer.apply_chat_template(prompt_of(p), add_generation_prompt=True, tokenize=False) for p in problems]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([p.answer + TURN_END for p in problems], add_special_tokens=False)["input_ids"]
    length = max(len(q) + len(a) for q, a in zip(prompt_ids, answer_ids, strict=True))
    input_ids = torch.full((len(problems), length), tokenizer.pad_token_id)
    labels = torch.full((len(problems), length), -100)
    for row, (question, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        end = len(question) + len(answer)
        input_ids[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
    return input_ids, labels
