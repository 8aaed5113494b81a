"""Makes a tiny random model of every family in the table, with the family's peculiar settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING

from qerl_verl.nvfp4.architectures import automatic_class, get_architecture

SIZES = dict(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "Qwen2ForCausalLM": ("qwen2", {}),
    "Qwen3ForCausalLM": ("qwen3", dict(head_dim=64)),
    "Qwen3MoeForCausalLM": (
        "qwen3_moe",
        dict(head_dim=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[1]),
    ),
    "LlamaForCausalLM": ("llama", {}),
    "MistralForCausalLM": ("mistral", {}),
    "Ministral3ForCausalLM": (
        "ministral3",
        dict(head_dim=64, rope_parameters=YARN | dict(llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0)),
    ),
    "SmolLM3ForCausalLM": ("smollm3", dict(no_rope_layers=[1, 0], tie_word_embeddings=False)),
    "GraniteForCausalLM": (
        "granite",
        dict(embedding_multiplier=12.0, logits_scaling=8.0, residual_multiplier=0.22, attention_multiplier=0.1),
    ),
    "Phi3ForCausalLM": (
        "phi3",
        dict(
            original_max_position_embeddings=128,
            rope_parameters=dict(
                rope_type="longrope",
                rope_theta=10000.0,
                partial_rotary_factor=0.75,
                short_factor=[1.0 + i / 10 for i in range(12)],
                long_factor=[1.0 + i for i in range(12)],
                original_max_position_embeddings=128,
            ),
        ),
    ),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        dict(
            head_dim=64,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            tie_word_embeddings=False,
        ),
    ),
    "Olmo2ForCausalLM": ("olmo2", {}),
    "Olmo3ForCausalLM": (
        "olmo3",
        dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"], rope_parameters=YARN),
    ),
    "Exaone4ForCausalLM": (
        "exaone4",
        dict(
            head_dim=64,
            sliding_window=8,
            sliding_window_pattern=2,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
    ),
    "Glm4ForCausalLM": ("glm4", dict(head_dim=64)),
    "SeedOssForCausalLM": ("seed_oss", dict(head_dim=64)),
    "Qwen3_5ForCausalLM": (
        "qwen3_5_text",
        dict(
            head_dim=64,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10000.0,
                partial_rotary_factor=0.25,
                mrope_section=[3, 3, 2],
                mrope_interleaved=True,
            ),
        ),
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        "qwen2_5_vl",
        dict(rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])),
    ),
    "Qwen3VLForConditionalGeneration": (
        "qwen3_vl",
        dict(
            head_dim=32,
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, mrope_section=[6, 5, 5], mrope_interleaved=True
            ),
        ),
    ),
}
"""Architecture -> transformers' model_type, and its (the decoder's) configuration beside
:data:`SIZES`. A mixture has a layer with experts and one without."""

TOWERS = {
    "Qwen2_5_VLForConditionalGeneration": dict(window_size=56, fullatt_block_indexes=[1]),
    "Qwen3VLForConditionalGeneration": dict(num_position_embeddings=64, deepstack_visual_indexes=[0]),
}
"""Architecture -> configuration of its vision tower beside :data:`TOWER`."""
TOWER = dict(
    depth=2, hidden_size=64, intermediate_size=48, num_heads=2, patch_size=14, out_hidden_size=SIZES["hidden_size"]
)
IMAGE_TOKENS = dict(image_token_id=92, video_token_id=93, vision_start_token_id=94, vision_end_token_id=95)


def make_config(architecture: str, **changes):
    """Returns transformers' configuration of a tiny model."""
    model_type, settings = FAMILIES[architecture]
    settings = SIZES | settings | changes
    if architecture not in TOWERS:
        return CONFIG_MAPPING[model_type](**settings, architectures=[architecture])
    settings.setdefault("tie_word_embeddings", False)
    whole = {key: settings.pop(key) for key in IMAGE_TOKENS if key in settings}
    return CONFIG_MAPPING[model_type](
        text_config=settings,
        vision_config=TOWER | TOWERS[architecture],
        tie_word_embeddings=settings["tie_word_embeddings"],
        architectures=[architecture],
        **IMAGE_TOKENS | whole,
    )


def make_model(architecture: str, **changes):
    """Returns a tiny model with transformers' own random weights, and its configuration."""
    config = make_config(architecture, **changes)
    torch.manual_seed(0)
    model = automatic_class(get_architecture(config)).from_config(config)
    assert type(model).__name__ == architecture
    return config, model


def make_family(
    architecture: str, folder: Path, dtype: torch.dtype = torch.bfloat16, std: float = 0.15, **changes
) -> Path:
    """Writes a checkpoint with random weights, norms and biases, no two tensors alike.

    Args:
        std: standard deviation of all weights. Those of norms lie around 1, also where the model
            stores the difference from 1.

    Returns:
        The folder.
    """
    config = make_config(architecture, **changes)
    torch.manual_seed(len(architecture))
    model = automatic_class(get_architecture(config)).from_config(config, dtype=dtype)
    assert type(model).__name__ == architecture
    for name, parameter in model.named_parameters():
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        if mean and not name.endswith(".linear_attn.norm.weight"):
            mean -= get_architecture(config).norm_offset
        torch.nn.init.normal_(parameter, mean=mean, std=std)
    model.save_pretrained(folder)
    return folder


RANK, ALPHA = 4, 8


def make_adapter(folder: Path, linears: dict[str, tuple[int, int]]) -> Path:
    """Writes a random adapter, as the trainer saves it, for linears of shapes (output, input
    features).
    """
    from peft import LoraConfig

    from qerl_verl.lora.peft import save_adapter
    from qerl_verl.lora.targets import last_names

    generator, tensors = torch.Generator().manual_seed(11), {}
    for name, (outputs, inputs) in linears.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs, generator=generator) * 0.1
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.1
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=last_names(linears))
    save_adapter(folder, tensors, config, "")
    return folder


def actor(quantized: Path):
    """Returns the model of a packed checkpoint as the engine builds it, in float32."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, swap_linears

    config = AutoConfig.from_pretrained(quantized)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        automatic = automatic_class(get_architecture(config))
        model = automatic.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    swap_linears(model, packed_linear_names(quantized), torch.float32)
    load_tensors(model, quantized, torch.float32)
    return model.requires_grad_(False).eval()


def log_probabilities(model, prompt: list[int], **inputs) -> torch.Tensor:
    """Returns those of all tokens of a prompt but the first, ``[len(prompt) - 1]`` float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt]), use_cache=False, **inputs).logits[0, :-1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(prompt[1:])[:, None])[:, 0].double()


def _stack_experts(state: dict[str, torch.Tensor], config) -> dict[str, torch.Tensor]:
    """Returns the tensors of a checkpoint under transformers' names, with experts stacked."""
    rows: dict[str, list[torch.Tensor]] = {}
    for name in [name for name in state if ".experts." in name]:
        module, _, rest = name.partition(".experts.")
        expert, projection, _ = rest.split(".")
        stack = "down_proj" if projection == "down_proj" else "gate_up_proj"
        place = rows.setdefault(
            f"{module}.experts.{stack}", [None] * (config.num_experts * (1 + (stack != projection)))
        )
        place[int(expert) if stack == projection else 2 * int(expert) + (projection == "up_proj")] = state.pop(name)
    return state | {n: torch.cat(t).view(config.num_experts, -1, t[0].shape[1]) for n, t in rows.items()}


class Reference:
    """transformers' model with the decoded weights of an NVFP4 checkpoint in float64 and in
    float32.

    The distance between the two is the cost of float32. Other code for the same model in float32 is
    as far from float64.
    """

    MARGIN = 3.0
    """Largest ratio of two programs' errors, root mean squares over some hundred values, if they
    round in different places."""

    def __init__(self, checkpoint: Path):
        from transformers import AutoConfig

        from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
        from qerl_verl.nvfp4.loading import iterate_tensors

        tensors, state = dict(iterate_tensors(checkpoint)), {}
        for name, tensor in tensors.items():
            base, _, part = name.rpartition(".")
            if part == "weight_packed":
                parts = (tensors[f"{base}.{p}"] for p in ("weight_packed", "weight_scale", "weight_global_scale"))
                state[f"{base}.weight"] = dequantize_nvfp4(*parts, dtype=torch.float32)
            elif not part.startswith("weight_"):
                state[name] = tensor.float()
        config = AutoConfig.from_pretrained(checkpoint)
        del config.quantization_config
        state = _stack_experts(state, config)
        self.models = []
        for dtype in (torch.float64, torch.float32):
            automatic = automatic_class(get_architecture(config))
            model = automatic.from_config(config, dtype=dtype, attn_implementation="eager").eval()
            if hasattr(model, "set_experts_implementation"):  # the default does not take float64
                model.set_experts_implementation("eager")
            missing, unexpected = model.load_state_dict(state, strict=False)
            assert not unexpected and set(missing) <= {"lm_head.weight"}
            model.tie_weights()
            self.models.append(model)

    @contextmanager
    def adapted(self, adapter: Path) -> Iterator[None]:
        """Returns the reference with an adapter added to the weights."""
        from safetensors.torch import load_file

        tensors = load_file(adapter / "adapter_model.safetensors")
        deltas = {}
        for name, a in tensors.items():
            if name.endswith("lora_A.weight"):
                b = tensors[name.replace("lora_A", "lora_B")]
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                deltas[f"{module}.weight"] = b.double() @ a.double() * (ALPHA / RANK)
        with self._changed(_stack_experts(deltas, self.models[0].config)):
            yield

    @contextmanager
    def noised(self, norms: Iterable[str], seed: int, step: int, sigma: float) -> Iterator[None]:
        """Returns the reference with noise on norms, keyed by full name."""
        from qerl_verl.aqn.noise import draw_noise

        size = self.models[0].config.get_text_config().hidden_size
        with self._changed({f"{norm}.weight": draw_noise(seed, step, norm, size, sigma) for norm in norms}):
            yield

    @contextmanager
    def _changed(self, deltas: dict[str, torch.Tensor]) -> Iterator[None]:
        before = [{name: model.get_parameter(name).data.clone() for name in deltas} for model in self.models]
        for model in self.models:
            for name, delta in deltas.items():
                parameter = model.get_parameter(name)
                parameter.data = (parameter.data.double() + delta).to(parameter.dtype)
        yield
        for model, old in zip(self.models, before, strict=True):
            for name, value in old.items():
                model.get_parameter(name).data = value

    def check(self, prompts: list[list[int]], found: list[list[float]], inputs: list[dict] | None = None) -> None:
        """Checks that log-probabilities of ``prompts`` from float32 code are the float64 model's.

        Args:
            prompts: token ids.
            found: the log-probabilities to check.
            inputs: further inputs of the model for each prompt, such as images.
        """
        inputs = inputs or [{}] * len(prompts)
        exact, rounded = (
            torch.cat([log_probabilities(model, p, **i) for p, i in zip(prompts, inputs, strict=True)])
            for model in self.models
        )
        error = torch.cat([torch.as_tensor(f, dtype=torch.float64) for f in found]) - exact
        rounding = root_mean_square(rounded - exact)
        print(f"error {root_mean_square(error):.2e}, of transformers in float32 {rounding:.2e}")
        assert root_mean_square(error) < self.MARGIN * rounding


def root_mean_square(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()
