"""Tests the adapter in the layers without an engine: placing, tensor parallelism, and refusals."""

import pytest
import torch
from torch import nn

from qerl_verl.kernels.backends import get_backend
from qerl_verl.rollout.linear_lora import attach_adapter
from qerl_verl.rollout.lora import AdapterStore, LoraSettings, adapter_scaling, lora_settings, shard

HIDDEN, HEAD, HEADS, KV_HEADS, INNER, RANK = 256, 64, 4, 2, 512, 8
SETTINGS = LoraSettings(rank=RANK, alpha=16)
PROJECTIONS = {  # name in the adapter: inputs, outputs
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD),
    "self_attn.o_proj": (HEADS * HEAD, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}


class Layer(nn.Module):
    """The attributes of a linear layer of vLLM on one rank."""

    def __init__(self, inputs, widths, backend, dtype):
        super().__init__()
        self.logical_widths, self.input_size_per_partition = widths, inputs
        attach_adapter(self, SETTINGS, backend, dtype, torch.device("cpu"))

    def forward(self, x):
        """Returns the LoRA delta alone, by projection."""
        y = self.qerl_adapter.add(self, x.new_zeros(*x.shape[:-1], sum(self.logical_widths)), x)
        return y.split(self.logical_widths, dim=-1)


def build(tp=1, backend="pytorch", dtype=torch.float64):
    """Returns one decoder layer of vLLM's Qwen2 as each of ``tp`` ranks has it."""
    kv = HEAD * max(1, KV_HEADS // tp)
    sizes = {
        "self_attn": {"qkv_proj": (HIDDEN, [HEADS * HEAD // tp, kv, kv]), "o_proj": (HEADS * HEAD // tp, [HIDDEN])},
        "mlp": {"gate_up_proj": (HIDDEN, [INNER // tp] * 2), "down_proj": (INNER // tp, [HIDDEN])},
    }
    block = nn.ModuleDict(
        {
            group: nn.ModuleDict({name: Layer(*size, get_backend(backend), dtype) for name, size in members.items()})
            for group, members in sizes.items()
        }
    )
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([block])})})


def adapter(seed=0, rank=RANK):
    torch.manual_seed(seed)
    tensors = {}
    for name, (inputs, outputs) in PROJECTIONS.items():
        prefix = f"base_model.model.model.layers.0.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, inputs, dtype=torch.float64)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, rank, dtype=torch.float64)
    return tensors


def delta(tensors, name, x, scaling=2.0):
    a, b = (tensors[f"base_model.model.model.layers.0.{name}.lora_{part}.weight"] for part in "AB")
    return scaling * x @ a.t() @ b.t()


def block_of(model):
    return model["model"]["layers"][0]


def buffers(model):
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


@pytest.mark.parametrize("backend", ["pytorch", "hopper"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_ranks_together_compute_the_whole_adapter(tp, backend):
    """Column-parallel layers are concatenated, row-parallel layers summed; hopper pads rank 8 to 16
    and permutes B.
    """
    tensors, ranks = adapter(), [build(tp, backend) for _ in range(tp)]
    for rank, model in enumerate(ranks):
        assert AdapterStore(model, rank, tp).load(tensors.items(), 2.0) == len(tensors)
        assert block_of(model)["mlp"]["down_proj"].qerl_lora_b.shape == (HIDDEN, 16 if backend == "hopper" else RANK)
    blocks = [block_of(model) for model in ranks]
    x, x_inner = torch.randn(5, HIDDEN, dtype=torch.float64), torch.randn(5, INNER, dtype=torch.float64)

    q, k, v = zip(*(b["self_attn"]["qkv_proj"](x) for b in blocks), strict=True)
    copies = max(1, tp // KV_HEADS)  # neighbouring ranks share a key and value head
    for parts, name, step in ((q, "q_proj", 1), (k, "k_proj", copies), (v, "v_proj", copies)):
        expected = delta(tensors, f"self_attn.{name}", x)
        torch.testing.assert_close(torch.cat(parts[::step], dim=-1), expected)
        assert all(torch.equal(part, parts[i // step * step]) for i, part in enumerate(parts))
    gate, up = zip(*(b["mlp"]["gate_up_proj"](x) for b in blocks), strict=True)
    torch.testing.assert_close(torch.cat(gate, dim=-1), delta(tensors, "mlp.gate_proj", x))
    torch.testing.assert_close(torch.cat(up, dim=-1), delta(tensors, "mlp.up_proj", x))

    for group, name, inputs in (("self_attn", "o_proj", x), ("mlp", "down_proj", x_inner)):
        columns = inputs.chunk(tp, dim=-1)
        total = sum(b[group][name](c)[0] for b, c in zip(blocks, columns, strict=True))
        torch.testing.assert_close(total, delta(tensors, f"{group}.{name}", inputs))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_adapter_of_fused_linears_is_one_of_each_projection(tp):
    """Some checkpoints hold q, k and v, or gate and up, in one matrix. On four ranks vLLM repeats
    key and value heads, of which the adapter has the rows once.
    """
    tensors, fused = adapter(), {}
    for names, name in (("qkv", "self_attn.qkv_proj"), (("gate", "up"), "mlp.gate_up_proj")):
        prefix, group = "base_model.model.model.layers.0.", name.partition(".")[0]
        parts = [f"{prefix}{group}.{part}_proj.lora_" for part in names]
        a = tensors[f"{parts[0]}A.weight"]
        for part in parts:
            tensors[f"{part}A.weight"] = a
        fused[f"{prefix}{name}.lora_A.weight"] = a
        fused[f"{prefix}{name}.lora_B.weight"] = torch.cat([tensors[f"{part}B.weight"] for part in parts])
    for rank in range(tp):
        expected, found = build(tp), build(tp)
        for model in (expected, found):
            qkv, gate_up = block_of(model)["self_attn"]["qkv_proj"], block_of(model)["mlp"]["gate_up_proj"]
            qkv.num_kv_head_replicas = max(1, tp // KV_HEADS)  # as vLLM's layers know them
            qkv.output_sizes = [width * tp for width in qkv.logical_widths]
            gate_up.output_sizes = [width * tp for width in gate_up.logical_widths]
        AdapterStore(expected, rank, tp).load(
            [(n, t) for n, t in tensors.items() if ".o_" not in n and "down" not in n], 2.0
        )
        assert AdapterStore(found, rank, tp).load(fused.items(), 2.0) == 4
        for buffer, tensor in buffers(expected).items():
            assert torch.equal(buffers(found)[buffer], tensor), buffer
    fused[f"{prefix}{name}.lora_B.weight"] = fused[f"{prefix}{name}.lora_B.weight"][1:]
    with pytest.raises(ValueError, match=r"mlp.gate_up_proj does not fit .* B has 1023 rows, .* have \[512, 512\]"):
        AdapterStore(found, rank, tp).load(fused.items(), 2.0)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_adapter_of_a_delta_nets_linears(tp):
    """vLLM computes in_proj_qkv and in_proj_z as one layer of four projections, of which the first
    three share A."""
    rows, prefix = [32, 32, 64, 64], "base_model.model.model.layers.0.linear_attn."
    torch.manual_seed(3)
    tensors = {}
    for name, count in (("in_proj_qkv", 128), ("in_proj_z", 64)):
        tensors[f"{prefix}{name}.lora_A.weight"] = torch.randn(RANK, HIDDEN, dtype=torch.float64)
        tensors[f"{prefix}{name}.lora_B.weight"] = torch.randn(count, RANK, dtype=torch.float64)
    x, outputs = torch.randn(5, HIDDEN, dtype=torch.float64), []
    for rank in range(tp):
        layer = Layer(HIDDEN, [size // tp for size in rows], get_backend("pytorch"), torch.float64)
        layer.output_sizes = rows
        modules = {"in_proj_qkvz": layer}
        for part in ("linear_attn", "0", "layers", "model"):
            modules = {part: nn.ModuleDict(modules)}
        assert AdapterStore(nn.ModuleDict(modules), rank, tp).load(tensors.items(), 2.0) == 4
        outputs.append(layer(x))
    found = torch.cat([torch.cat(pieces, dim=-1) for pieces in zip(*outputs, strict=True)], dim=-1)
    expected = torch.cat([delta(tensors, f"linear_attn.{name}", x) for name in ("in_proj_qkv", "in_proj_z")], dim=-1)
    torch.testing.assert_close(found, expected)


def test_a_part_of_a_tensor():
    whole = torch.arange(12).view(6, 2)
    assert torch.equal(shard(whole, 0, 6, 3, 4), whole)
    assert torch.equal(shard(whole, 0, 3, 1, 2), whole[3:])
    assert [shard(whole, 0, 3, rank, 4)[0, 0].item() for rank in range(4)] == [0, 0, 6, 6]
    # not whole parts, too small, three parts for four ranks
    for size, tp in ((4, 2), (12, 1), (2, 4)):
        with pytest.raises(ValueError, match="cannot be divided"):
            shard(whole, 0, size, 0, tp)


@pytest.mark.parametrize("form", ["{}", "base_model.model.{}", "{}.default"])
def test_names_with_and_without_pefts_prefix_and_adapter_name(form):
    store = AdapterStore(build(), 0, 1)
    module = "model.layers.0.self_attn.v_proj.lora_B"
    name = f"{form.format(module)}.weight"
    assert store.locate(name) == ("model.layers.0.self_attn.qkv_proj", (2,), "B")
    assert store.locate(f"{form.format('model.layers.0.mlp.down_proj.lora_A')}.weight")[1:] == ((), "A")


def test_a_decoder_in_a_module_of_its_own_is_found_by_transformers_names():
    renamed = ("model.language_model.", "language_model.model.")
    store = AdapterStore(torch.nn.ModuleDict({"language_model": build()}), 0, 1, renamed)
    name = "base_model.model.model.language_model.layers.0.self_attn.v_proj.lora_B.weight"
    assert store.locate(name) == ("language_model.model.layers.0.self_attn.qkv_proj", (2,), "B")
    with pytest.raises(ValueError, match="for which the rollout model has no NVFP4 layer"):
        store.locate("base_model.model.model.visual.blocks.0.mlp.gate_proj.lora_B.weight")


def test_buffers_start_at_zero_and_are_no_part_of_the_checkpoint():
    model = build(backend="hopper", dtype=torch.bfloat16)
    assert all(not t.any() and t.dtype == torch.bfloat16 for t in buffers(model).values())
    assert len(buffers(model)) == 8 and model.state_dict() == {}


def test_a_load_writes_in_place_and_zeroes_what_the_adapter_lacks():
    """CUDA graphs hold the addresses of the buffers."""
    model = build()
    store, first = AdapterStore(model, 0, 1), adapter(0)
    store.load(first.items(), 2.0)
    places = {name: t.data_ptr() for name, t in model.named_buffers()}
    some = {n: t for n, t in adapter(1).items() if "q_proj" in n or "down_proj" in n}
    assert store.load(some.items(), 2.0) == 4
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    q, k, v = block_of(model)["self_attn"]["qkv_proj"](x)
    torch.testing.assert_close(q, delta(some, "self_attn.q_proj", x))
    assert not k.any() and not v.any() and not block_of(model)["mlp"]["gate_up_proj"].qerl_lora_b.any()
    assert {name: t.data_ptr() for name, t in model.named_buffers()} == places
    store.load(first.items(), 2.0)
    torch.testing.assert_close(block_of(model)["self_attn"]["qkv_proj"](x)[1], delta(first, "self_attn.k_proj", x))


def test_an_adapter_of_a_smaller_rank_fits():
    model, tensors = build(), adapter(rank=3)
    AdapterStore(model, 0, 1).load(tensors.items(), 2.0)
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(block_of(model)["self_attn"]["o_proj"](x)[0], delta(tensors, "self_attn.o_proj", x))


@pytest.mark.parametrize("scaling", [2.0, 0.25, 16 / RANK**0.5])
def test_the_adapters_own_scaling_counts(scaling):
    """The layers multiply by lora_alpha / rank of the configuration; what differs goes into B."""
    model, tensors = build(), adapter()
    AdapterStore(model, 0, 1).load(tensors.items(), scaling)
    x = torch.randn(3, HIDDEN, dtype=torch.float64)
    got = block_of(model)["self_attn"]["o_proj"](x)[0]
    torch.testing.assert_close(got, delta(tensors, "self_attn.o_proj", x, scaling), rtol=1e-6, atol=1e-4)


PREFIX = "base_model.model.model.layers.0"
BAD = {
    "no such layer": (
        {f"{PREFIX}.mlp.router.lora_A.weight": torch.zeros(RANK, HIDDEN)},
        "has no NVFP4 layer: take its module out of",
    ),
    "no LoRA tensor": ({f"{PREFIX}.mlp.down_proj.lora_magnitude_vector": torch.zeros(1)}, "lora_magnitude_vector"),
    "A without B": ({f"{PREFIX}.mlp.up_proj.lora_B.weight": None}, "mlp.gate_up_proj, projection 1, but not the other"),
    "B without A": ({f"{PREFIX}.mlp.up_proj.lora_A.weight": None}, "mlp.gate_up_proj, projection 1, but not the other"),
    "rank too large": (adapter(rank=9), "room for rank 8: set actor_rollout_ref.model.lora_rank"),
    "ranks of A and B": ({f"{PREFIX}.mlp.down_proj.lora_A.weight": torch.zeros(4, INNER)}, "A (4, 512) and B (256, 8)"),
    "another width": (
        {f"{PREFIX}.mlp.down_proj.lora_A.weight": torch.zeros(RANK, INNER + 64)},
        "mlp.down_proj, projection 0, does not fit the rollout model",
    ),
    "another height": (
        {f"{PREFIX}.self_attn.k_proj.lora_B.weight": torch.zeros(HEAD - 1, RANK)},
        "qkv_proj, projection 1, does not fit the rollout model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_by_name_and_leaves_the_buffers_alone(case):
    changed, message = BAD[case]
    model = build()
    store = AdapterStore(model, 0, 1)
    store.load(adapter(0).items(), 2.0)
    before = buffers(model)
    tensors = {n: t for n, t in (adapter(1) | changed).items() if t is not None}
    with pytest.raises(ValueError) as caught:
        store.load(tensors.items(), 2.0)
    assert message in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in model.named_buffers())


def test_scaling_of_a_peft_configuration():
    from peft import LoraConfig

    assert adapter_scaling({"r": 8, "lora_alpha": 16}) == 2.0
    config = LoraConfig(r=16, lora_alpha=32, use_rslora=True)
    assert adapter_scaling(config) == adapter_scaling(config.to_dict()) == 8.0
    for pattern in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=f"{pattern} .* use punica"):
            adapter_scaling(LoraConfig(r=8, **{pattern: {"q_proj": 4}}))


def test_settings_from_vllms_additional_config():
    assert lora_settings({"qerl": {"lora": {"rank": 8, "alpha": 32}}}) == LoraSettings(8, 32.0)
    assert LoraSettings(8, 32.0).scaling == 4.0
    for other in (None, {}, {"qerl": {"kernel": "auto"}}, {"qerl": {"lora": None}}, {"theirs": 1}):
        assert lora_settings(other) is None
