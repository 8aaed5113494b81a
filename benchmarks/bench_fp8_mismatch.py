"""What FP8 rounding does to the agreement of rollout and actor, on a real model, on a CPU or a GPU.

    python benchmarks/bench_fp8_mismatch.py --model MODEL --text test.jsonl --json benchmarks/results/fp8_mismatch_smollm2_135m_cpu.json

The linears of a 16-bit model are quantized to NVFP4, rounded to nearest. The model then reads texts
in two ways that compute the
same policy, as rollout and actor do: GEMMs in bfloat16 or in float32, whose sums have another
order, both rounded to bfloat16; attention by SDPA or by transformers' own. Tokens are drawn from
the first way's distributions, and k3 is verl's estimate of the KL divergence between the two ways
in nats a token (``rollout_corr/k3_kl``). ``bits`` is the number of significant bits that
activations keep: 8 is bfloat16, 4 is E4M3; ``weights`` says whether the weight is rounded to E4M3.
``policies`` is the divergence of each rounding from no rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from bench_quantizers import processor
from torch import nn

from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4
from qerl_verl.kernels.nvfp4_fp8_linear import nvfp4_to_fp8_reference, quantize_rows_reference, through_fp8
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4

DRAWS = 4
"""Tokens that are drawn at each position."""

ROUNDINGS = ((8, False), (8, True), (7, False), (6, False), (5, False), (4, False), (4, True))
"""Significant bits of activations, and whether weights go through E4M3."""


def keep_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """bfloat16 values rounded to so many significant bits, ties to even; 4 as E4M3 does."""
    if bits == 8:
        return x
    if bits == 4:
        return through_fp8(*quantize_rows_reference(x.reshape(-1, x.shape[-1])), x.dtype).view(x.shape)
    mantissa, exponent = torch.frexp(x.float())
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(x.dtype)


class Linear(nn.Module):
    """An NVFP4 linear whose rounding and GEMM are chosen for all of them at once."""

    bits, weights, sums = 8, False, torch.bfloat16

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.data
        packed, scale = quantize_nvfp4(weight, global_scale := nvfp4_global_scale(weight.abs().max()))
        self.alpha, self.bias = 1 / global_scale.item(), linear.bias
        self.exact = block_values_nvfp4(packed, scale, torch.bfloat16)
        self.rounded = through_fp8(*nvfp4_to_fp8_reference(packed, scale), torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.rounded if self.weights else self.exact
        rows = keep_bits(x.reshape(-1, x.shape[-1]), self.bits).to(self.sums)
        bias = rows.new_zeros(len(weight)) if self.bias is None else self.bias.to(self.sums)
        y = torch.addmm(bias, rows, weight.to(self.sums).t(), alpha=self.alpha)
        return y.to(x.dtype).view(*x.shape[:-1], len(weight))


def read_texts(path: Path, tokenizer, count: int, length: int) -> list[torch.Tensor]:
    """Returns the first texts with their chat template, cuts off at ``length`` tokens."""
    rows = [json.loads(line) for line in path.open()][:count]
    chats = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in rows
    ]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    return [tokenizer(text, return_tensors="pt").input_ids[:, :length] for text in texts]


def k3(p: torch.Tensor, q: torch.Tensor) -> tuple[float, float]:
    """Returns KL(p || q) from log-probabilities of tokens that p drew, and its standard error."""
    difference = (q - p).double()
    values = difference.exp() - difference - 1
    return values.mean().item(), (values.std() / values.numel() ** 0.5).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a 16-bit model")
    parser.add_argument("--text", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--length", type=int, default=192, help="tokens of a text at most")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(device).eval()
    texts = read_texts(args.text, AutoTokenizer.from_pretrained(args.model), args.texts, args.length)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear(module))

    @torch.no_grad()
    def logprobs(bits: int, weights: bool, sums: torch.dtype, attention: str) -> torch.Tensor:
        Linear.bits, Linear.weights, Linear.sums = bits, weights, sums
        model.set_attn_implementation(attention)
        return torch.cat([model(ids.to(device)).logits[0].float().log_softmax(-1) for ids in texts])

    generator = torch.Generator(device).manual_seed(0)
    result, first = [], None
    for bits, weights in ROUNDINGS:
        one = logprobs(bits, weights, torch.bfloat16, "sdpa")
        tokens = torch.multinomial(one.exp(), DRAWS, replacement=True, generator=generator)
        p = one.gather(1, tokens)
        q = logprobs(bits, weights, torch.float32, "eager").gather(1, tokens)
        if first is None:
            first, first_tokens = one, tokens
        entropy = -(one.exp() * one).sum(-1).mean().item()
        sides, policies = k3(p, q), k3(first.gather(1, first_tokens), one.gather(1, first_tokens))
        result.append(
            {"bits": bits, "weights": weights, "k3": sides, "k3_over_bf16": sides[0] / (result or [{"k3": sides}])[0]["k3"][0],
             "policies": policies, "entropy": entropy}
        )  # fmt: skip
        print(json.dumps(result[-1]), flush=True)
        del one
    out = {
        "command": "python " + " ".join(["benchmarks/bench_fp8_mismatch.py", *sys.argv[1:]]),
        "processor": processor(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "model": args.model.name,
        "positions": sum(ids.shape[1] for ids in texts),
        "draws": DRAWS,
        "roundings": result,
    }
    if args.json:
        args.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
