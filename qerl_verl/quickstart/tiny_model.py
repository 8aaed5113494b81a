"""A Qwen2 model small enough to train on two cores, made on the spot.

``make_tiny_model`` builds the tokenizer and the network, gives it a short supervised start on the quickstart's
arithmetic and saves a Hugging Face checkpoint. The start is cut short on purpose: reinforcement learning needs answers
that are sometimes right and sometimes wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from qerl_verl.quickstart.arithmetic import Problem, messages

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
    positions: int = 256


@dataclass(frozen=True)
class SupervisedStart:
    """The supervised start: AdamW until the model is right this often, or ``max_steps``."""

    accuracy: float = 0.4
    max_steps: int = 1500
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 20
    check_every: int = 20


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
    problems: Sequence[Problem], tokenizer: Qwen2Tokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids`` and ``labels``, both ``[problem, position]``; only the answer and the end of the turn are labels."""
    prompts = [tokenizer.apply_chat_template(messages(p), add_generation_prompt=True, tokenize=False) for p in problems]
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


def answer_probability(model: Qwen2ForCausalLM, input_ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean probability of the right answer, which is the expected accuracy of sampling at temperature 1.

    Args:
        model: any causal language model.
        input_ids, labels: see :func:`_encode`.
    """
    with torch.no_grad():
        log_probs = model(input_ids=input_ids).logits[:, :-1].float().log_softmax(-1)
    targets = labels[:, 1:]
    token = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    return token.sum(-1).exp().mean().item()


def make_tiny_model(
    folder: Path,
    train: Sequence[Problem],
    *,
    shape: Shape = Shape(),
    start: SupervisedStart = SupervisedStart(),
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, accuracy: None,
) -> float:
    """Build, train and save the model in bfloat16.

    Args:
        folder: gets a Hugging Face checkpoint with tokenizer and chat template.
        train: problems of the supervised start.
        shape, start, seed: as named.
        report: called every ``start.check_every`` steps with the step and the accuracy so far.

    Returns:
        The accuracy reached: expected, of sampling at temperature 1, on the training problems.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = Qwen2Config(
        # as many rows as tokens: verl forbids the engine to sample any others, which the trainer does not know of
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    input_ids, labels = _encode(train, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=start.lr, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / start.warmup))
    accuracy = 0.0
    for step in range(start.max_steps):
        rows = torch.randint(len(train), (start.batch,))
        logits = model(input_ids=input_ids[rows]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % start.check_every == 0:
            probe = torch.arange(0, len(train), max(1, len(train) // 256))
            accuracy = answer_probability(model, input_ids[probe], labels[probe])
            report(step + 1, accuracy)
            if accuracy >= start.accuracy:
                break
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return accuracy
