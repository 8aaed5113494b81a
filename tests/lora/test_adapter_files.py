"""Tests adapters in PEFT's format against a model: every tensor has a place and every place a
tensor."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from qerl_verl.lora.adapter_files import (
    AdapterError,
    check_loaded,
    find_unsupported,
    map_names,
    read_adapter_config,
    read_tensors,
)

RANK = 4
LAYERS = {
    f"model.layers.{i}.{part}": shape
    for i in range(2)
    for part, shape in (("self_attn.q_proj", (64, 32)), ("self_attn.v_proj", (16, 32)), ("mlp.down_proj", (32, 96)))
}
HEAD = {"score.weight": (1, 32), "score.bias": (1,)}
CONFIG = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def shapes(head=False):
    """Returns the shapes of an adapter of q_proj and v_proj, by PEFT's names."""
    out = {}
    for name, (rows, columns) in LAYERS.items():
        if "self_attn" in name:
            out[f"base_model.model.{name}.lora_A.weight"] = (RANK, columns)
            out[f"base_model.model.{name}.lora_B.weight"] = (rows, RANK)
    return out | {f"base_model.model.{name}": shape for name, shape in HEAD.items() if head}


# --- names ---

RENAMED = {
    "as PEFT saves it": lambda n: n,
    "without PEFT's prefix": lambda n: n.removeprefix("base_model.model."),
    "without the model's name": lambda n: n.replace("base_model.model.model.", ""),
    "with the adapter's name": lambda n: n.replace(".weight", ".default.weight"),
    "of a compiled model": lambda n: f"_orig_mod.{n}",
    "of wrapped layers": lambda n: n.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "of FSDP": lambda n: n.replace("model.layers.", "_fsdp_wrapped_module.model.layers."),
    "of DDP": lambda n: f"module.{n}",
}


@pytest.mark.parametrize("rename", RENAMED.values(), ids=RENAMED)
def test_names_are_mapped_to_pefts(rename):
    names = {rename(name): name for name in shapes()}
    found = map_names({rename(name): shape for name, shape in shapes().items()}, CONFIG, LAYERS)
    assert found == names


@pytest.mark.parametrize(
    "spelling", ["score.{}", "base_model.model.score.modules_to_save.default.{}", "score.modules_to_save.{}"]
)
def test_a_critics_head_is_mapped_too(spelling):
    named = {spelling.format("weight"): (1, 32), spelling.format("bias"): (1,)}
    found = map_names(shapes() | named, CONFIG, LAYERS, HEAD)
    assert [found[name] for name in named] == ["base_model.model.score.weight", "base_model.model.score.bias"]


def without(word):
    return {name: shape for name, shape in shapes().items() if word not in name}


def renamed(old, new):
    return {name.replace(old, new): shape for name, shape in shapes().items()}


DOWN = {f"model.layers.0.mlp.down_proj.lora_{p}.weight": s for p, s in (("A", (RANK, 96)), ("B", (32, RANK)))}
REFUSED = {
    "none of LoRA": ({"model.norm.weight": (32,)}, {}, ["none of the 1 tensors of its file is a LoRA tensor"]),
    "empty": ({}, {}, ["none of the 0 tensors of its file is a LoRA tensor"]),
    "another model": (renamed("self_attn", "attn"), {}, ["8 of its 8 tensors have no place in the model: ", "8 of the 8 LoRA"]),
    "more layers": (
        shapes() | renamed("layers.0", "layers.7"),
        {},
        ["4 of its 12 tensors have no place in the model: base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"],
    ),
    "a layer that its configuration does not name": (
        shapes() | DOWN,
        {},
        ["2 of its 10 tensors have no place in the model: model.layers.0.mlp.down_proj.lora_A.weight, "
         "model.layers.0.mlp.down_proj.lora_B.weight. Its adapter_config.json says target_modules=['q_proj', 'v_proj']"],
    ),
    "fewer layers": (
        without("layers.1"),
        {},
        ["4 of the 8 LoRA tensors that its adapter_config.json promises are not in its file"],
    ),
    "a module more": (shapes(), {"target_modules": ["q_proj", "v_proj", "down_proj"]}, ["4 of the 12 LoRA tensors"]),
    "without B": (without("lora_B"), {}, ["4 of the 8 LoRA tensors"]),
    "embeddings": (
        shapes() | {"base_model.model.model.embed_tokens.lora_embedding_A": (RANK, 99)},
        {},
        ["1 of its 9 tensors have no place in the model: base_model.model.model.embed_tokens.lora_embedding_A"],
    ),
    "DoRA": (
        shapes() | {f"{n.partition('.lora_A')[0]}.lora_magnitude_vector": (64,) for n in shapes() if "lora_A" in n},
        {},
        ["4 of its 12 tensors have no place"],
    ),
    "a value head of TRL": (shapes() | {"v_head.summary.weight": (1, 32)}, {}, ["1 of its 9 tensors", "v_head.summary.weight"]),
    "a critic's": (shapes(head=True), {}, ["2 of its 10 tensors have no place in the model: base_model.model.score.bias"]),
    "another rank": (shapes(), {"r": 8}, ["lora_A.weight has shape [4, 32] where the model and r=8 need [8, 32]"]),
    "another width": (
        {name: (s[0], 48) if "lora_A" in name else s for name, s in shapes().items()},
        {},
        ["lora_A.weight has shape [4, 48] where the model and r=4 need [4, 32]"],
    ),
    "twice": (shapes() | {n.removeprefix("base_model.model."): s for n, s in shapes().items()}, {}, ["two of its 16 tensors"]),
    "one for every layer": (shapes(), {"layers_to_transform": [0]}, ["4 of its 8 tensors have no place in the model"]),
}  # fmt: skip
"""Tensors, changes of the configuration, and what the message says."""


@pytest.mark.parametrize("found, changes, named", REFUSED.values(), ids=REFUSED)
def test_an_adapter_whose_tensors_are_not_the_models_is_refused_with_the_counts(found, changes, named):
    with pytest.raises(AdapterError) as error:
        map_names(found, CONFIG | changes, LAYERS)
    for text in named:
        assert text in str(error.value)


def test_an_actors_adapter_is_none_for_a_critic():
    with pytest.raises(AdapterError, match="no value head in it; give the adapter of a critic"):
        map_names(shapes(), CONFIG, LAYERS, HEAD)


def test_layers_that_the_configuration_leaves_out_need_no_tensors():
    found = map_names(without("layers.1"), CONFIG | {"layers_to_transform": [0]}, LAYERS)
    assert len(found) == 4


# --- the configuration ---

UNSUPPORTED = [
    ("lora_alpha", 0, "lora_alpha=0 in its adapter_config.json: the LoRA delta would be multiplied by that"),
    ("lora_alpha", -8, "lora_alpha=-8 in"),
    ("lora_alpha", None, "lora_alpha=None in"),
    ("lora_alpha", float("nan"), "lora_alpha=nan in"),
    ("r", 0, "r=0 in its adapter_config.json"),
    ("r", None, "r=None in its adapter_config.json"),
    ("peft_type", "ADALORA", "peft_type=ADALORA in its adapter_config.json; LORA alone can go on"),
    ("target_modules", None, "no target_modules in its adapter_config.json"),
    (
        "init_lora_weights",
        "pissa",
        "init_lora_weights=pissa in its adapter_config.json: the adapter belongs to a base whose",
    ),
    ("init_lora_weights", "olora", "init_lora_weights=olora"),
    ("init_lora_weights", "pissa_niter_16", "init_lora_weights=pissa_niter_16"),
    ("use_dora", True, "use_dora=True"),
    ("bias", "all", "bias=all"),
    ("lora_bias", True, "lora_bias=True"),
    ("rank_pattern", {"q_proj": 8}, "rank_pattern={'q_proj': 8}"),
    ("alpha_pattern", {"q_proj": 8}, "alpha_pattern="),
    ("modules_to_save", ["embed_tokens"], "modules_to_save=['embed_tokens']"),
    ("trainable_token_indices", [5], "trainable_token_indices=[5]"),
    ("layer_replication", [[0, 2], [1, 3]], "layer_replication="),
    ("target_parameters", ["mlp.weight"], "target_parameters="),
    ("alora_invocation_tokens", [1, 2], "alora_invocation_tokens="),
    ("use_qalora", True, "use_qalora=True"),
    ("use_bdlora", {"nblocks": 2}, "use_bdlora="),
    ("arrow_config", {"top_k": 2}, "arrow_config="),
    ("monteclora_config", {"buffer_size": 2}, "monteclora_config="),
    ("velora_config", {"num_groups": 2}, "velora_config="),
    ("kasa_config", {"x": 1}, "kasa_config="),
    ("fan_in_fan_out", True, "fan_in_fan_out=True"),
    ("ensure_weight_tying", True, "ensure_weight_tying=True"),
    ("use_something_new", True, "use_something_new=True in its adapter_config.json; plain LoRA tensors alone"),
]
"""A field of adapter_config.json, its value, and what the message says."""


@pytest.mark.parametrize("name, value, named", UNSUPPORTED)
def test_what_is_not_plain_lora_is_refused_by_its_field(name, value, named):
    (problem,) = find_unsupported(CONFIG | {name: value})
    assert named in problem


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.1, "lora_alpha": 12.5},
        {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["o_proj"]},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": "gaussian", "revision": "main", "auto_mapping": {"base_model_class": "X"}},
        {"use_something_new": False, "another_config": None, "peft_version": "0.99"},
    ],
)
def test_plain_lora_is_taken(tmp_path, changes):
    assert find_unsupported(CONFIG | changes) == []
    LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path)["r"] == 4  # all fields of this PEFT, at their defaults


def test_a_critics_heads_may_be_saved_beside_the_adapter():
    saved = CONFIG | {"modules_to_save": ["classifier", "score"]}
    assert find_unsupported(saved, heads=("classifier", "score")) == [] and len(find_unsupported(saved)) == 1


def test_every_field_of_pefts_is_decided_on():
    """When this fails, PEFT has a field that changes an adapter: decide whether such an adapter is
    accepted.
    """
    from dataclasses import fields

    from qerl_verl.lora import adapter_files

    known = {name for name, *_ in UNSUPPORTED} | adapter_files._CHOICES
    # see init_lora_weights
    initialization = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    elsewhere = {"megatron_config", "megatron_core", "qalora_group_size", "runtime_config"}
    assert {f.name for f in fields(LoraConfig)} - known - initialization - elsewhere == set()


# --- files ---


def test_files_that_cannot_be_read(tmp_path):
    def said(read):
        with pytest.raises(AdapterError) as error:
            read(tmp_path)
        return str(error.value)

    assert said(read_adapter_config).startswith("no adapter_config.json there")
    (tmp_path / "adapter_config.json").write_text("{")
    assert "not valid JSON" in said(read_adapter_config)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert "not a JSON object" in said(read_adapter_config)
    assert said(read_tensors) == "neither adapter_model.safetensors nor adapter_model.bin is there"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half a file")
    assert "its tensors cannot be read" in said(read_tensors)
    tensors = {"a.lora_A.weight": torch.tensor([1.0, torch.nan]), "a.lora_B.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert said(read_tensors) == "1 of its 2 tensors hold NaN or Inf: a.lora_A.weight; take an earlier checkpoint"


def test_pickles_are_read_as_well(tmp_path):
    torch.save({"a.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.bin")
    assert read_tensors(tmp_path)["a.lora_A.weight"].tolist() == [1, 1]


def test_what_peft_took_is_compared_with_the_file():
    file = {name: torch.rand(shape) for name, shape in shapes().items()}
    check_loaded({name: tensor.clone() for name, tensor in file.items()}, file)
    check_loaded({name: tensor.to("meta") for name, tensor in file.items()}, file)
    first, second, *_ = file
    loaded = {name: tensor.clone() for name, tensor in file.items() if name != first} | {"other": torch.ones(1)}
    loaded[second] += 1
    with pytest.raises(
        AdapterError, match=r"PEFT took 6 of its 8 tensors; not taken: .*; without one in the file: other"
    ):
        check_loaded(loaded, file)


def test_json_of_the_folder_is_what_peft_reads(tmp_path):
    LoraConfig(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj"]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert read_adapter_config(tmp_path) == content
