"""Writes random models of the benchmarks' shapes: an NVFP4 checkpoint, a bf16 one, an adapter.

On random weights, kernels run at the speed of real weights; on zeros they would be faster. Nothing
is downloaded.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class Shapes(dict):
    """Name -> settings of ``config.json``. ``BASE-N`` without an entry is BASE with N layers."""

    def __missing__(self, name: str) -> dict:
        base, _, layers = name.rpartition("-")
        if base not in self or not layers.isdecimal():
            raise KeyError(f"{name}: choose one of {', '.join(self)}, or one of them with -N behind it for N layers")
        return {**self[base], "num_hidden_layers": int(layers)}


SHAPES = Shapes({
    # Qwen2.5-7B
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    # Qwen2.5-14B, -32B and -72B
    "14B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "32B": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "72B": {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    # two layers as wide as those of the 7B
    "7B-2": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 2, "num_attention_heads": 28,
             "num_key_value_heads": 4, "vocab_size": 32768, "tie_word_embeddings": False},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 4, "vocab_size": 32768, "tie_word_embeddings": False},
    # to try a benchmark on the CPU
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": False},
    # Qwen3-30B-A3B, a mixture of experts
    "30B-A3B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32,
                "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
                "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    "tiny-moe": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024, "tie_word_embeddings": False,
                 "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
})  # fmt: skip
RANK = 32
WRITERS = min(8, os.cpu_count() or 1)
"""Files of a model that are written at once."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(shape: str) -> dict:
    """Returns ``config.json`` in bfloat16: Qwen2's, or Qwen3-MoE's for a shape with experts."""
    architecture, model_type = (
        ("Qwen3MoeForCausalLM", "qwen3_moe") if has_experts(shape) else ("Qwen2ForCausalLM", "qwen2")
    )
    return {
        "architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
        "use_sliding_window": False, **SHAPES[shape],
    }  # fmt: skip


def has_experts(shape: str) -> bool:
    """Returns whether the MLPs are mixtures of experts."""
    return "num_experts" in SHAPES[shape]


def linears(shape: str) -> dict[str, tuple[int, int]]:
    """Returns name within a layer -> ``(rows, columns)`` of each linear that takes an adapter.

    Experts take none.
    """
    c = SHAPES[shape]
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim", hidden // c["num_attention_heads"])
    heads, kv = head * c["num_attention_heads"], head * c["num_key_value_heads"]
    attention = {
        "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, heads),
    }  # fmt: skip
    if has_experts(shape):
        return attention
    return attention | {
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip


def expert_linears(shape: str) -> dict[str, tuple[int, int]]:
    """Returns name within a layer -> ``(rows, columns)`` of the experts' linears."""
    c = SHAPES[shape]
    hidden, inner = c["hidden_size"], c.get("moe_intermediate_size")
    sizes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    experts = range(c.get("num_experts", 0))
    return {f"mlp.experts.{expert}.{name}": size for expert in experts for name, size in sizes.items()}


def write_config(folder: Path, shape: str, quantized: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = config(shape)
    if quantized:
        from qerl_verl.nvfp4.format import QUANTIZATION_CONFIG

        routers = ["re:.*mlp.gate$"] if has_experts(shape) else []
        content["quantization_config"] = {
            **QUANTIZATION_CONFIG,
            "ignore": [*QUANTIZATION_CONFIG["ignore"], *routers],
        }
    (folder / "config.json").write_text(json.dumps(content, indent=1))
    return folder


def write_nvfp4(folder: Path, shape: str, device: str = DEVICE) -> Path:
    """Writes an NVFP4 checkpoint with random codes, scales and weights of plausible size.

    Layers are made and written at the same time on :data:`WRITERS` threads. The 16-bit weights of
    the linears never exist.
    """
    write_config(folder, shape, quantized=True)
    c = SHAPES[shape]
    map_: dict[str, str] = {}

    def write(file: int) -> None:
        layer = file - 1
        tensors = random_ends(shape, file, device) if layer < 0 else random_layer(shape, layer, file, device)
        name = "model-ends.safetensors" if layer < 0 else f"model-{layer:02}.safetensors"
        tensors = {k: v.cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        map_.update(dict.fromkeys(tensors, name))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(1 + c["num_hidden_layers"])))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": map_}))
    return folder


class Random:
    """Random tensors of one file, which do not depend on the other files."""

    def __init__(self, seed: int, device: str):
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *size: int, std: float = 0.02) -> torch.Tensor:
        return torch.randn(*size, device=self.device, dtype=torch.bfloat16, generator=self.generator) * std

    def codes(self, rows: int, columns: int) -> torch.Tensor:
        """Returns ``[rows, columns]`` uint8. Eight bytes are drawn at once, which is eight times
        as fast."""
        count, ends = -(-rows * columns // 8), torch.iinfo(torch.int64)
        drawn = torch.empty(count, dtype=torch.int64, device=self.device)
        drawn.random_(ends.min, ends.max, generator=self.generator)
        return drawn.view(torch.uint8)[: rows * columns].view(rows, columns)

    def scales(self, rows: int, columns: int) -> torch.Tensor:
        drawn = torch.rand(rows, columns, device=self.device, generator=self.generator)
        return (drawn * 300 + 20).to(torch.float8_e4m3fn)


def random_ends(shape: str, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Returns embeddings, last norm and output layer."""
    c, draw = SHAPES[shape], Random(seed, device)
    hidden, vocabulary = c["hidden_size"], c["vocab_size"]
    out = {"model.embed_tokens.weight": draw.normal(vocabulary, hidden), "model.norm.weight": 1 + draw.normal(hidden)}
    if not c["tie_word_embeddings"]:
        out["lm_head.weight"] = draw.normal(vocabulary, hidden)
    return out


def random_layer(shape: str, layer: int, seed: int, device: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of one layer."""
    c, draw, tensors = SHAPES[shape], Random(seed, device), {}
    hidden, prefix = c["hidden_size"], f"model.layers.{layer}."
    for name, (rows, columns) in (linears(shape) | expert_linears(shape)).items():
        tensors[f"{prefix}{name}.weight_packed"] = draw.codes(rows, columns // 2)
        tensors[f"{prefix}{name}.weight_scale"] = draw.scales(rows, columns // 16)
        tensors[f"{prefix}{name}.weight_global_scale"] = torch.full((1,), 3e4 * (columns / 3584) ** 0.5)
        if not has_experts(shape) and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            tensors[f"{prefix}{name}.bias"] = draw.normal(rows)
    if has_experts(shape):
        tensors[f"{prefix}mlp.gate.weight"] = draw.normal(c["num_experts"], hidden)
        for norm in ("q_norm", "k_norm"):
            tensors[f"{prefix}self_attn.{norm}.weight"] = 1 + draw.normal(c["head_dim"])
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{norm}.weight"] = 1 + draw.normal(hidden)
    return tensors


def write_bf16(folder: Path, nvfp4: Path, shape: str) -> Path:
    """Writes the model of an NVFP4 checkpoint of :func:`write_nvfp4`, decoded to bfloat16."""
    from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4

    write_config(folder, shape, quantized=False)
    map_: dict[str, str] = {}
    for file in sorted(nvfp4.glob("*.safetensors")):
        source, tensors = load_file(file, device=DEVICE), {}
        for name, tensor in source.items():
            base, _, kind = name.rpartition(".")
            if kind == "weight_packed":
                scale = source[f"{base}.weight_scale"].view(torch.uint8)
                tensors[f"{base}.weight"] = dequantize_nvfp4(tensor, scale, source[f"{base}.weight_global_scale"]).cpu()
            elif not kind.startswith("weight_"):
                tensors[name] = tensor.cpu()
        save_file(tensors, folder / file.name, metadata={"format": "pt"})
        map_.update(dict.fromkeys(tensors, file.name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": map_}))
    return folder


def write_adapter(folder: Path, shape: str, base: str, device: str = DEVICE) -> Path:
    """Writes a PEFT adapter of rank 32 on every linear layer, with random A and B."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    tensors = {}
    for layer in range(SHAPES[shape]["num_hidden_layers"]):
        for name, (rows, columns) in linears(shape).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}."
            tensors[prefix + "lora_A.weight"] = torch.randn(RANK, columns, device=device) / columns**0.5
            tensors[prefix + "lora_B.weight"] = torch.randn(rows, RANK, device=device) * 0.01
    save_file({k: v.bfloat16().cpu().contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0, "bias": "none",
            "target_modules": sorted({n.split(".")[-1] for n in linears(shape)}), "base_model_name_or_path": base,
        })
    )  # fmt: skip
    return folder
