"""The tiny model of most tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def make_model(folder: Path, **overrides) -> Path:
    """Writes a random tiny Qwen2 checkpoint in bfloat16 with the quickstart's tokenizer.

    Returns:
        The folder.
    """
    from qerl_verl.quickstart.tiny_model import build_tokenizer

    tokenizer = build_tokenizer()
    settings = dict(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=512,
        initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**settings, **overrides})).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
