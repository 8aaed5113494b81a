"""Tests the table of architectures against the models of transformers."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import AttentionInterface

from qerl_verl.nvfp4.architectures import (
    DOCUMENTATION,
    NOT_YET,
    UnsupportedArchitecture,
    get_architecture,
    logits_divisor,
    supported_architectures,
)
from qerl_verl.nvfp4.checkpoint_files import read_headers
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import is_ignored, read_ignore
from qerl_verl.nvfp4.loading import iterate_tensors, packed_linear_names
from qerl_verl.nvfp4.model_shapes import linear_shapes
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.validation import check_checkpoint
from tests.helpers.tiny_families import FAMILIES, TOWERS, make_config, make_family, make_model

VARIANTS = [
    *((name, {}) for name in FAMILIES),
    *((name, {"tie_word_embeddings": True}) for name in FAMILIES),
    *((name, {"num_key_value_heads": 4}) for name in ("Phi3ForCausalLM", "Olmo2ForCausalLM")),
    *(
        (name, {"attention_bias": True})
        for name in ("Qwen3ForCausalLM", "LlamaForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM")
    ),
    *((name, {"attention_bias": True}) for name in ("Gemma3ForCausalLM", "Olmo2ForCausalLM")),
    *((name, {"mlp_bias": True}) for name in ("LlamaForCausalLM", "SmolLM3ForCausalLM", "GraniteForCausalLM")),
    ("Glm4ForCausalLM", {"attention_bias": False}),
    ("LlamaForCausalLM", {"head_dim": 24}),
]


def test_the_table_is_what_these_tests_cover():
    assert set(supported_architectures()) == set(FAMILIES)


@pytest.mark.parametrize("name, kwargs", VARIANTS)
def test_tensor_shapes_are_those_of_the_model(name, kwargs):
    """The shapes include a vision tower's; names of published checkpoints are mapped to the
    model's."""
    config, model = make_model(name, **kwargs)
    want = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if kwargs.get("tie_word_embeddings"):
        del want["lm_head.weight"]
    for stack in [key for key in want if ".experts." in key]:
        experts, rows, columns = want.pop(stack)
        base, _, kind = stack.rpartition(".")
        for part in ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,):
            shape = (rows // 2 if kind == "gate_up_proj" else rows, columns)
            want |= {f"{base}.{expert}.{part}.weight": shape for expert in range(experts)}
    assert get_architecture(config).tensor_shapes(config) == want


@pytest.mark.parametrize("name", FAMILIES)
def test_linears_are_all_but_lm_head(name):
    config, model = make_model(name)
    architecture = get_architecture(config)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    ignored = {n for n in linears if is_ignored(n, architecture.plain_modules)}
    tower = {n for n in linears if architecture.vision and n.startswith(architecture.vision)}
    small = {n for n in linears if n.endswith((".linear_attn.in_proj_a", ".linear_attn.in_proj_b"))}
    assert ignored == tower | small and bool(small) == bool(architecture.delta_nets)
    assert set(architecture.plain_linears(config)) == small | set(architecture.routers(config))
    linears -= ignored
    packed = [linear for group in architecture.all_groups(config) for linear in group]
    assert set(packed) <= {n.removesuffix(".weight") for n in architecture.tensor_shapes(config)}
    assert len(packed) == len(set(packed)) and linears <= set(packed)
    beside = {linear for linear in packed if ".self_attn." in linear or ".experts." in linear}
    assert set(architecture.adaptable(packed)) == (beside if architecture.experts else linears)
    assert sorted(n for group in architecture.scale_groups() for n in group) == sorted(architecture.linears)
    for i in range(2):
        in_groups = [linear for group in architecture.layer_groups(config, i) for linear in group]
        assert sorted(in_groups) == sorted(architecture.linear_shapes(config, i))


def test_where_experts_are():
    """Exactly the layers in which transformers' model has experts have them, with its routers."""
    layers = {}
    for changes in ({}, {"decoder_sparse_step": 2}, {"mlp_only_layers": []}, {"mlp_only_layers": None}):
        config, model = make_model("Qwen3MoeForCausalLM", **changes)
        row = get_architecture(config)
        found = [i for i in range(2) if row.has_experts(config, i)]
        assert found == [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        assert row.routers(config) == tuple(n for n, m in model.named_modules() if n.endswith("mlp.gate"))
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if ".experts." in n}
        stacks = row.experts.stacked_shapes(config)
        assert shapes == {f"model.layers.{i}.{name}": shape for i in found for name, shape in stacks.items()}
        layers[str(changes)] = found
    assert list(layers.values()) == [[0], [], [0, 1], [0, 1]]


@pytest.mark.parametrize("name", TOWERS)
def test_a_published_checkpoints_names_are_mapped(tmp_path, name):
    """transformers saves under the names of published checkpoints.

    Where these differ, the packed checkpoint has the model's names, and its config.json excludes
    the tower.
    """
    config, model = make_model(name)
    make_family(name, tmp_path / "source")
    with safe_open(tmp_path / "source" / "model.safetensors", "pt") as file:
        saved = set(file.keys())
    assert (
        {get_architecture(config).module_name(n) for n in saved}
        == set(model.state_dict())
        == set(read_headers(tmp_path / "source"))
    )
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed", progress=False)
    assert check_checkpoint(tmp_path / "packed") == "nvfp4"
    packed = packed_linear_names(tmp_path / "packed")
    assert packed == set(linear_shapes(tmp_path / "packed")) == set(linear_shapes(tmp_path / "source"))
    assert read_ignore(tmp_path / "packed") == ["lm_head", r"re:(?:.*\.)?visual\..*"]
    kept = dict(iterate_tensors(tmp_path / "source"))
    for key, tensor in iterate_tensors(tmp_path / "packed"):
        assert "visual." not in key or torch.equal(tensor, kept[key])


@pytest.mark.parametrize("name", TOWERS)
def test_the_names_of_a_tower_in_every_program(name):
    """They match in transformers' model, in vLLM's and in older checkpoints, and match no
    decoder name."""
    row = get_architecture(make_config(name))
    for tower in ("visual.", "model.visual."):
        assert is_ignored(f"{tower}blocks.0.attn.qkv", row.plain_modules) and row.is_of_tower(f"{tower}merger.mlp.0")
        assert row.module_name("model.visual.blocks.0.attn.qkv") == "model.visual.blocks.0.attn.qkv"
    for decoder in ("model.layers.", "model.language_model.layers.", "language_model.model.layers."):
        name = f"{decoder}0.self_attn.q_proj"
        assert not is_ignored(name, row.plain_modules) and not row.is_of_tower(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_norm_stands_beside_the_named_linears_and_no_others(name):
    """The tensor that a norm returns is the very tensor that its linears get, or the tensor that it
    gets is the very one that its linear returns. Every norm as wide as the model is in the row,
    with the linears that it feeds or the one that feeds it.
    """
    config, model = make_model(name)
    row = get_architecture(config)
    taken, given = {}, {}
    for module_name, module in model.named_modules():
        if module_name.startswith(row.layer_prefix) and (
            module_name.endswith(("norm", "mlp.gate", "mlp.experts")) or isinstance(module, torch.nn.Linear)
        ):

            def hook(module, arguments, output, key=module_name):
                taken[key], given[key] = arguments[0], output[0] if isinstance(output, tuple) else output

            module.register_forward_hook(hook)
    model(torch.arange(6).view(1, 6))

    def same(one, other):
        # tokens of all sequences in one dimension
        return one is other or one.data_ptr() == other.data_ptr()

    sizes = config.get_text_config()
    wide = {n for n in taken if n.endswith("norm") and model.get_submodule(n).weight.shape == (sizes.hidden_size,)}
    for i in range(sizes.num_hidden_layers):
        layer = f"{row.layer_prefix}{i}."
        for norm, projections in row.norms_in_front.items():
            fed = {key for key, value in taken.items() if same(value, given[layer + norm])}
            linears = row.noise_targets_of(config, i).get(norm) or row._linears_of(projections)
            assert fed == {layer + linear for linear in linears}
        for norm, (projection,) in row.norms_behind.items():
            assert taken[layer + norm] is given[layer + projection]
        beside = {layer + norm for norm in (*row.norms_in_front, *row.norms_behind)}
        others = {layer + norm for norm in (*row.output_norms, "linear_attn.norm")}  # as wide by chance
        assert beside == {n for n in wide if n.startswith(layer)} - others
        assert row.noise_targets and set(row.noise_targets) <= {norm.removeprefix(layer) for norm in beside}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_norm_adds_to_its_stored_weight(name):
    """A stored weight of 1 minus the row's offset acts as 1, also in the norms of heads and the
    last."""
    config, model = make_model(name)
    row = get_architecture(config)
    for norm_name, norm in model.named_modules():
        if norm_name.startswith(row.decoder) and norm_name.endswith("norm"):
            of_net = norm_name.endswith(".linear_attn.norm")  # it adds nothing, and multiplies by a gate
            torch.nn.init.constant_(norm.weight, 1.0 if of_net else 1.0 - row.norm_offset)
            x = torch.randn(3, norm.weight.numel())
            given = (x, torch.full_like(x, 1.278464543)) if of_net else (x,)  # silu is 1 there
            torch.testing.assert_close(
                norm(*given), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt(), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_rows_are_those_of_the_projections_in_their_order(name):
    config, _ = make_model(name)
    row = get_architecture(config)
    shapes, projections = row.tensor_shapes(config), row.projection_shapes(config)
    assert [p for linear in row.linears for p in row.projections_of(linear)] == list(projections)
    for linear in row.linears:
        parts = [projections[projection] for projection in row.projections_of(linear)]
        layer = next(i for i in (1, 0) if linear in row.linear_shapes(config, i) or not row.delta_nets)
        assert shapes[f"{row.layer_prefix}{layer}.{linear}.weight"] == (sum(rows for rows, _ in parts), parts[0][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_model_does_with_its_output_layers_result(name):
    config, model = make_model(name)
    outputs = []
    model.lm_head.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    logits = model(torch.arange(6).view(1, 6)).logits
    torch.testing.assert_close(logits, outputs[0] / logits_divisor(config))


@pytest.mark.parametrize("name", FAMILIES)
def test_whether_positions_reach_the_attention_function(name):
    """Fails when transformers passes them on, or takes them, in another family."""
    config, model = make_model(name)
    seen = []

    def attention(module, query, key, value, mask, position_ids=None, **kwargs):
        seen.append(position_ids)
        return query.transpose(1, 2), None

    AttentionInterface.register("qerl_test", attention)
    model.config.get_text_config()._attn_implementation = "qerl_test"
    positions = torch.arange(6).view(1, 6)
    # verl gives positions in the sequence and in an image's time, height and width
    if name in TOWERS:
        positions = positions.expand(4, 1, 6)
    model(torch.arange(6).view(1, 6), position_ids=positions)
    assert (seen[0] is None) == get_architecture(config).keeps_positions


REFUSED = [
    ("Gemma3ForCausalLM", {"use_bidirectional_attention": True}, "a policy has to be causal"),
    ("Olmo3ForCausalLM", {"attention_bias": True}, "vLLM's model is built for this value alone"),
    ("Qwen3MoeForCausalLM", {"attention_bias": True}, "vLLM's model is built for this value alone"),
    ("Exaone4ForCausalLM", {"attention_bias": True}, "transformers' model is built for this value alone"),
    ("Exaone4ForCausalLM", {"mlp_bias": True}, "transformers' model is built for this value alone"),
    ("SeedOssForCausalLM", {"attention_bias": False}, "vLLM's model is built for this value alone"),
    ("SeedOssForCausalLM", {"attention_out_bias": True}, "vLLM's model is built for this value alone"),
    ("SeedOssForCausalLM", {"mlp_bias": True}, "vLLM's model is built for this value alone"),
    (
        "Qwen3_5ForCausalLM",
        {"attn_output_gate": False},
        "vLLM goes by the setting, and transformers' model is built for this value alone",
    ),
]


def test_a_gate_of_another_kind_is_refused():
    for kind in (None, "silu", "swish"):
        config = make_config("Qwen3_5ForCausalLM", output_gate_type=kind)
        assert get_architecture(config).tensor_shapes(config)
    config = make_config("Qwen3_5ForCausalLM", output_gate_type="sigmoid")
    with pytest.raises(UnsupportedArchitecture, match="with output_gate_type=sigmoid .*: output_gate_type=silu"):
        get_architecture(config).tensor_shapes(config)


@pytest.mark.parametrize(("name", "setting", "reason"), REFUSED)
def test_a_variant_that_is_not_served_is_refused_with_the_reason(name, setting, reason):
    config = make_config(name, **setting)
    ((key, value),) = setting.items()
    with pytest.raises(UnsupportedArchitecture) as error:
        get_architecture(config).tensor_shapes(config)
    assert f"{name} with {key}={value} in config.json is not supported, because {reason}: {key}={not value}" in str(
        error.value
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_lookup_by_dict_or_object(name):
    assert get_architecture({"architectures": [name]}).name == name
    assert get_architecture(SimpleNamespace(architectures=[name])) is get_architecture({"architectures": [name]})


@pytest.mark.parametrize(
    "config, named",
    [
        ({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}, "Qwen3MoeForCausalLM"),
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "Qwen2VLForConditionalGeneration"),
        (
            {"architectures": ["Qwen3_5ForConditionalGeneration"]},
            "Qwen3_5ForConditionalGeneration, which is not supported: ",
        ),
        ({"architectures": ["Qwen3_5MoeForCausalLM"]}, "Qwen3_5ForCausalLM alone is packed here"),
        ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
        ({}, "none"),
        (SimpleNamespace(architectures=["MixtralForCausalLM"]), "MixtralForCausalLM"),
    ],
)
def test_others_are_refused_by_name(config, named):
    with pytest.raises(UnsupportedArchitecture) as error:
        get_architecture(config)
    assert isinstance(error.value, CheckpointError) and isinstance(error.value, ValueError)
    assert named in str(error.value)
    assert all(name in str(error.value) for name in FAMILIES)
    assert DOCUMENTATION in str(error.value)


def test_the_page_lists_every_family_as_its_row_says():
    """Otherwise: python docs/models_table.py."""
    page = Path(__file__).parents[2] / DOCUMENTATION
    specification = importlib.util.spec_from_file_location("models_table", page.with_name("models_table.py"))
    models_table = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(models_table)
    text = page.read_text(encoding="utf-8")
    assert models_table.render(text) == text
    assert all(f"| `{name}` |" in text for name in FAMILIES) and all(f"`{name}`" in text for name in NOT_YET)
    assert set(models_table.NAMES) == set(supported_architectures())


def test_packed_rows_of_delta_nets_share_a_state_without_flash_linear_attention():
    """Qwen3.5 trains in padded rows for this reason, and its class with images is refused.

    The fallback receives the borders of sequences and does not use them, so verl passes them
    (verl/models/transformers/qwen3_5.py, _packed_chunk_gated_delta_rule). When this test fails, the
    reason in :data:`NOT_YET`, config/delta_nets.py and the documentation have to change.
    """
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 7, 2, 8).unbind(0)
    g, beta = -torch.rand(1, 7, 2), torch.rand(1, 7, 2)
    parts = [slice(0, 4), slice(4, 7)]
    packed, _ = torch_chunk_gated_delta_rule(query, key, value, g, beta, cu_seqlens=torch.tensor([0, 4, 7]))
    alone = [torch_chunk_gated_delta_rule(*(t[:, part] for t in (query, key, value, g, beta)))[0] for part in parts]
    torch.testing.assert_close(packed[:, parts[0]], alone[0])
    assert (packed[:, parts[1]] - alone[1]).abs().max() > 0.1
