"""Writes the table of docs/models.md from the table in qerl_verl/nvfp4/architectures.py.

``python docs/models_table.py`` rewrites what stands between the two marks of the page.
``tests/nvfp4/test_architectures.py`` holds the two together.
"""

from __future__ import annotations

from pathlib import Path

from qerl_verl.nvfp4.architectures import Architecture, get_architecture, supported_architectures

PAGE = Path(__file__).with_name("models.md")
BEGIN = "<!-- models: begin. Written by `python docs/models_table.py` from qerl_verl/nvfp4/architectures.py. -->"
END = "<!-- models: end -->"

NAMES = {
    "LlamaForCausalLM": "Llama 2 and 3, SmolLM2",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5",
    "Qwen3ForCausalLM": "Qwen3",
    "Qwen3MoeForCausalLM": "Qwen3 30B-A3B and 235B-A22B, Qwen3-Coder",
    "MistralForCausalLM": "Mistral 7B, Nemo, Small 24B",
    "Ministral3ForCausalLM": "text-only Ministral 3",
    "SmolLM3ForCausalLM": "SmolLM3",
    "GraniteForCausalLM": "Granite 3",
    "Phi3ForCausalLM": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "Gemma3ForCausalLM": "Gemma 3 text models",
    "Olmo2ForCausalLM": "OLMo 2",
    "Olmo3ForCausalLM": "OLMo 3",
    "Exaone4ForCausalLM": "EXAONE 4.0",
    "Glm4ForCausalLM": "GLM-4-0414",
    "SeedOssForCausalLM": "Seed-OSS",
    "Qwen3_5ForCausalLM": "text-only Qwen3.5 (dense)",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL (dense)",
}
"""``architectures`` of config.json -> the models that users know, in the order of the page."""

HEAD = (
    "`architectures` in config.json",
    "models",
    "beyond Llama's layers",
    "noise",
    "vLLM's LoRA path",
    "one copy of the base",
)


def table() -> str:
    """Returns the Markdown table, one row for each supported architecture.

    Raises:
        KeyError: a supported architecture has no entry in :data:`NAMES`.
    """
    order = list(NAMES)
    names = sorted(supported_architectures(), key=lambda name: order.index(name) if name in NAMES else -1)
    rows = [_row(get_architecture({"architectures": [name]})) for name in names]
    lines = [f"| {' | '.join(row)} |" for row in (HEAD, *rows)]
    return "\n".join([lines[0], "|---" * len(HEAD) + "|", *lines[1:]])


def _row(architecture: Architecture) -> tuple[str, ...]:
    shown = f"`{architecture.name}`"
    return (
        shown,
        NAMES[architecture.name],
        "; ".join(_peculiarities(architecture)),
        _noise(architecture),
        _lora_path(architecture),
        "yes" if architecture.shares_base else "no",
    )


def _peculiarities(architecture: Architecture) -> list[str]:
    out = []
    if architecture.experts:
        out.append("a mixture of experts in place of the MLP")
    if architecture.delta_nets:
        out.append("gated delta nets in place of attention in most layers")
    if architecture.gated_query:
        out.append("a gate in q")
    if architecture.vision:
        out.append("a vision tower")
    for parts in () if architecture.delta_nets else architecture.fused.values():
        out.append(f"the checkpoint fuses {_short(parts)}")
    if architecture.biased:
        out.append(f"biases on {_short(architecture.biased)}")
    if architecture.head_norms:
        out.append("norms on the heads of q and k")
    if architecture.output_norms:
        out.append("norms on the whole of q and of k")
    if architecture.norms_behind:
        out.append("norms behind the blocks" if architecture.norms_in_front else "norms behind the blocks only")
    if architecture.norm_offset:
        out.append(f"norms store their weight less {architecture.norm_offset:g}")
    if architecture.older_names:
        out.append("older names in published checkpoints")
    return out


def _short(parts: tuple[str, ...]) -> str:
    return ", ".join(part.rpartition(".")[2].removesuffix("_proj") for part in parts)


def _noise(architecture: Architecture) -> str:
    if not architecture.norms_in_front:
        return "behind"
    return "in front; not of experts, unless `qerl.aqn.router`" if architecture.experts else "in front"


def _lora_path(architecture: Architecture) -> str:
    if architecture.no_vllm_lora:
        return "no"
    return "16-bit layers only" if architecture.no_punica else "yes"


def render(page: str) -> str:
    """Returns the page with today's table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
