"""Tests target modules against the layers of a model."""

import pytest

from qerl_verl.lora.targets import find_problems, last_names, matched_layers, without_tower

PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.down_proj",
)
LAYERS = [f"model.layers.{i}.{part}" for i in range(12) for part in PARTS]
HAS = "The model has q_proj, k_proj, v_proj, o_proj, gate_proj, down_proj"

TAKEN = [
    ("all-linear", None, 72),
    (["q_proj"], None, 12),
    (["q_proj", "mlp.down_proj"], None, 24),
    (["layers.1.self_attn.q_proj"], None, 1),
    (r".*\.(q|v)_proj", None, 24),
    (r"model\.layers\.\d\.mlp\..*_proj", None, 20),
    ("all-linear", r".*\.mlp\..*", 48),
    ("all-linear", ["o_proj"], 60),
]
"""Targets, exclusions and how many layers have an adapter then."""


@pytest.mark.parametrize("targets, exclude, count", TAKEN)
def test_layers_that_have_an_adapter(targets, exclude, count):
    assert find_problems(LAYERS, targets, exclude) == []
    assert len(matched_layers(LAYERS, targets, exclude)) == count


REFUSED = [
    (["q_proj", "wq"], None, f"M.target_modules: wq is none of the linear layers. {HAS}; remove it"),
    (["wq"], None, f"M.target_modules: wq is none of the linear layers. {HAS}"),
    (["q_proj", "lm_head"], None, f"lm_head is none of the linear layers. {HAS}"),
    (["embed_tokens", "q_proj"], None, "embed_tokens is none of the linear layers"),
    (["self_attn"], None, "self_attn is none of the linear layers"),
    (["all-linear"], None, "all-linear is none of the linear layers"),
    (
        "q_proj",
        None,
        "target_modules=q_proj: a string is a regular expression for full names, as model.layers.0.self_attn",
    ),
    ("q_proj", None, "this one matches none. " + HAS + "; for names give a list, [q_proj]"),
    (".*", None, "the expression matches lm_head, which is no linear layer"),
    (r".*mlp.*", None, "the expression matches model.layers.0.mlp, which is no linear layer"),
    ("(", None, "M.target_modules=("),
    ([], None, "M.target_modules=[]: no layer would have an adapter"),
    (None, None, "M.target_modules=None: no layer would have an adapter"),
    ([7], None, "M.target_modules=[7]: no layer would have an adapter"),
    ("all-linear", "mlp", "M.exclude_modules: mlp matches no layer"),
    ("all-linear", ["wq"], "M.exclude_modules: wq matches no layer"),
    (["q_proj"], ".*q_proj", "M.exclude_modules=.*q_proj: no layer is left"),
]
"""Targets, exclusions and what the message says."""


@pytest.mark.parametrize("targets, exclude, named", REFUSED)
def test_targets_that_are_not_what_the_user_means(targets, exclude, named):
    (problem,) = find_problems(LAYERS, targets, exclude, key="M.")
    assert named in problem


def test_all_linear_means_every_layer_by_its_last_name():
    assert last_names(LAYERS) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]


TOWER = ["model.visual.blocks.0.mlp.gate_proj", "model.visual.blocks.0.attn.qkv"]
DECODER = [f"model.language_model.layers.0.{name}" for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj")]
WITHOUT_TOWER = [
    (None, DECODER),
    (".*visual.*", DECODER),  # as in verl's recipes
    ("gate_proj", DECODER),  # a regular expression that matches no full name
    (r".*\.up_proj", DECODER[:2]),
    (["gate_proj", "mlp.up_proj"], DECODER[:1]),
]


@pytest.mark.parametrize(("exclude", "left"), WITHOUT_TOWER)
def test_a_vision_tower_is_left_out_beside_what_the_user_leaves_out(exclude, left):
    """The layers of the tower have the decoder's last names."""
    pattern = without_tower(exclude, "model.visual.")
    assert matched_layers([*TOWER, *DECODER], last_names([*TOWER, *DECODER]), pattern) == set(left)
    assert without_tower(pattern, "model.visual.").count("visual") <= 2
    assert without_tower(exclude, "") == exclude


def test_to_exclude_a_vision_tower_is_no_mistake():
    assert find_problems(DECODER, "all-linear", ".*visual.*", tower=TOWER) == []
    (problem,) = find_problems(DECODER, "all-linear", ".*visual.*")
    assert "matches no layer" in problem
