"""Makes a Qwen2 model that is small enough to train on two cores.

``make_tiny_model`` builds the tokenizer and the network, trains it briefly with supervision on the
quickstart's arithmetic, and saves a Hugging Face checkpoint. The supervised start has two parts. On
right answers the model learns to calculate. On a few steps of mostly slightly wrong answers it
becomes careless. It then samples right and wrong answers to the same problem, which gives
reinforcement learning a signal.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from qerl_verl.data.prompts import user_turn
from qerl_verl.quickstart.arithmetic import Problem

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
WHOLE_WORDS = ("system", "user", "assistant")
"""Role names, one token each, so that a prompt stays short."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The network. Input sizes are multiples of 128, which every NVFP4 kernel accepts."""

    hidden: int = 128
    intermediate: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    positions: int = 256


@dataclass(frozen=True)
class SupervisedStart:
    """AdamW in float32. The learning rate falls to zero in each of the two parts."""

    steps: int = 800
    lr: float = 2e-3
    careless_steps: int = 60
    careless_lr: float = 1e-3
    careless_fraction: float = 0.7
    batch: int = 64


def build_tokenizer() -> Qwen2Tokenizer:
    """Returns a byte-level BPE tokenizer with ChatML.

    It has 256 bytes, merges that make each role name one token, and three marks. It is byte-level
    because ``AutoTokenizer`` rebuilds the tokenizer of a ``qwen2`` model from its vocabulary and
    merges with Qwen's own pre-tokenizer, and because verl requires that a newline is one token.
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


def encode(
    problems: Sequence[Problem], answers: Sequence[str], tokenizer: Qwen2Tokenizer
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``input_ids`` and ``labels``, both ``[problem, position]`` int64.

    Only the answer and the end of the turn are labels.
    """
    chats = [user_turn(p.question) for p in problems]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([answer + TURN_END for answer in answers], add_special_tokens=False)["input_ids"]
    length = max(len(q) + len(a) for q, a in zip(prompt_ids, answer_ids, strict=True))
    input_ids = torch.full((len(problems), length), tokenizer.pad_token_id)
    labels = torch.full((len(problems), length), -100)
    for row, (question, answer) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        end = len(question) + len(answer)
        input_ids[row, :end] = torch.tensor(question + answer)
        labels[row, len(question) : end] = torch.tensor(answer)
    return input_ids, labels


@torch.no_grad()
def sampled_accuracy(model: Qwen2ForCausalLM, problems: Sequence[Problem], tokenizer: Qwen2Tokenizer) -> float:
    """Returns the mean probability of the right answer, the expected accuracy at temperature 1."""
    input_ids, labels = encode(problems, [p.answer for p in problems], tokenizer)
    log_probs = model(input_ids=input_ids).logits[:, :-1].float().log_softmax(-1)
    targets = labels[:, 1:]
    token = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets >= 0)
    return token.sum(-1).exp().mean().item()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits PyTorch to one thread.

    So small a network gains little from more threads, which wait for each other on busy cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def make_tiny_model(
    folder: Path,
    train: Sequence[Problem],
    *,
    shape: Shape = Shape(),
    start: SupervisedStart = SupervisedStart(),
    seed: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> float:
    """Builds, trains and saves the model in bfloat16.

    Args:
        folder: receives a Hugging Face checkpoint with tokenizer and chat template.
        train: problems of the supervised start.
        shape, start, seed: the network, its training, and the seed of both.
        report: called with a line of progress now and then.

    Returns:
        :func:`sampled_accuracy` on the training problems.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    tokenizer = build_tokenizer()
    model = Qwen2ForCausalLM(_config(shape, tokenizer))

    problems = draw.choices(train, k=start.steps * start.batch)
    data = encode(problems, [p.answer for p in problems], tokenizer)
    _supervise(model, data, start.lr, start.batch, lambda step: report(f"supervised step {step} of {start.steps}"))
    report(f"right answers learned: {sampled_accuracy(model, train, tokenizer):.0%} of samples are right")

    problems = draw.choices(train, k=start.careless_steps * start.batch)
    answers = [draw.choice(p.slips()) if draw.random() < start.careless_fraction else p.answer for p in problems]
    _supervise(model, encode(problems, answers, tokenizer), start.careless_lr, start.batch)
    accuracy = sampled_accuracy(model, train, tokenizer)
    report(f"made careless: {accuracy:.0%} of samples are right")

    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return accuracy


def _config(shape: Shape, tokenizer: Qwen2Tokenizer) -> Qwen2Config:
    return Qwen2Config(
        # as many rows as tokens: verl forbids the engine to sample others, which the trainer does
        # not know
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


def _supervise(
    model: Qwen2ForCausalLM,
    data: tuple[torch.Tensor, torch.Tensor],
    lr: float,
    batch: int,
    report: Callable[[int], None] = lambda step: None,
) -> None:
    """Trains for one pass over ``data``, in order, with a short warm-up and a linear decay."""
    input_ids, labels = data
    steps = len(input_ids) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1.0) * (1 - step / steps))
    for step in range(steps):
        rows = slice(step * batch, (step + 1) * batch)
        logits = model(input_ids=input_ids[rows]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[rows, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            report(step + 1)
