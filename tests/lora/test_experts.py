"""Adapters on the experts of a mixture: their names, stock PEFT, vLLM's parser, and gradients
through a layer."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from qerl_verl.kernels.recompute import KeptOutputs
from qerl_verl.lora.adapter_files import AdapterError, map_names, read_adapter_config
from qerl_verl.lora.experts import is_of_experts, linear_targets, module_targets, split_experts, stack_experts
from qerl_verl.lora.peft import NVFP4LoraExperts, draw_adapter, published, register_nvfp4, save_adapter
from qerl_verl.nvfp4.experts import PROJECTIONS, STACKS
from qerl_verl.nvfp4.model_shapes import adaptable_shapes
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from tests.helpers.tiny_families import ALPHA, RANK, Reference, actor, log_probabilities, make_adapter, make_family

PROMPTS = [list(range(3, 35)), [7, 7, 8, 9] * 9]
TARGETS = ["q_proj", *PROJECTIONS]
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns a packed mixture with a layer of experts and one without, and a random adapter of
    it."""
    folder = tmp_path_factory.mktemp("experts")
    quantize_checkpoint(make_family("Qwen3MoeForCausalLM", folder / "source"), folder / "quantized", progress=False)
    adapter = make_adapter(folder / "adapter", adaptable_shapes(folder / "quantized"))
    return folder / "quantized", adapter


def adapted(model, **settings):
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, **{"target_modules": TARGETS, **settings})
    return get_peft_model(model, register_nvfp4(config, model))


def randomize(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_what_is_saved_loads_in_stock_peft(folders, tmp_path):
    """On the decoded base in float64, through PEFT's conversion of the names: the same
    log-probabilities."""
    model = randomize(adapted(actor(folders[0])))
    tensors = split_experts(get_peft_model_state_dict(model))
    save_adapter(tmp_path, tensors, published(model.peft_config["default"]), "")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(TARGETS) and not config["target_parameters"]
    reference = Reference(folders[0])
    with_peft = PeftModel.from_pretrained(reference.models[0], tmp_path)
    assert with_peft.peft_config["default"].target_parameters == set(STACKS)
    found, expected = (torch.cat([log_probabilities(m, p) for p in PROMPTS]) for m in (model, with_peft))
    with with_peft.disable_adapter():
        clean = torch.cat([log_probabilities(with_peft, p) for p in PROMPTS])
    assert (found - expected).abs().max() < 1e-4 < 1e-2 < (clean - expected).abs().max()


def test_only_the_adapter_trains_and_its_start_changes_nothing(folders):
    """A comes from the seed, as PEFT draws it; B is zero, so the outputs are the base's."""
    model = actor(folders[0])
    before = log_probabilities(model, PROMPTS[0])
    model = adapted(model)
    draw_adapter(model, 3)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trains) and {p.dtype for p in trains.values()} == {torch.float32}
    of_experts = {name.removeprefix(EXPERTS): p for name, p in trains.items() if name.startswith(EXPERTS)}
    assert {name: tuple(p.shape) for name, p in of_experts.items()} == {
        ".lora_A.default.gate_up_proj": (4, 2 * RANK, 128),
        ".lora_A.default.down_proj": (4, RANK, 48),
        ".lora_B.default.gate_up_proj": (4, 96, RANK),
        ".lora_B.default.down_proj": (4, 128, RANK),
    }
    assert torch.equal(log_probabilities(model, PROMPTS[0]), before)
    for name, columns in ((".lora_A.default.gate_up_proj", 128), (".lora_A.default.down_proj", 48)):
        largest = of_experts[name].abs().max().item()
        assert 0.9 * columns**-0.5 < largest <= columns**-0.5
    first = {name: p.detach().clone() for name, p in of_experts.items()}
    draw_adapter(model, 4)
    assert not torch.equal(first[".lora_A.default.down_proj"], of_experts[".lora_A.default.down_proj"])
    draw_adapter(model, 3)
    assert all(torch.equal(first[name], p) for name, p in of_experts.items())


def test_gradients_are_those_of_dense_experts_in_float64(folders):
    """Compares a whole model with transformers' under the adapter of stock PEFT."""
    model, reference = randomize(adapted(actor(folders[0]))), Reference(folders[0]).models[0]
    save = split_experts(get_peft_model_state_dict(model))
    plain = get_peft_model(
        reference, LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    )
    for parameter in plain.parameters():
        parameter.data = parameter.data.double()
    set_peft_model_state_dict(plain, {name: t.double() for name, t in save.items()})
    ids = torch.tensor([PROMPTS[0]])
    for each in (model, plain):
        logits = each(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        logits.gather(-1, ids[0, 1:, None]).sum().backward()
    found = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    theirs = {n.removeprefix("base_model.model."): p.grad for n, p in plain.named_parameters() if p.requires_grad}
    count, name = 4, "model.layers.0.mlp.experts"
    # PEFT: [E * rank, K] and [N, rank * E]; of gate and up with one rank for both, of which ours is
    # the diagonal
    gate_up_a = theirs[f"{name}.base_layer.lora_A.default.weight"].view(count, 2 * RANK, -1)
    gate_up_b = theirs[f"{name}.base_layer.lora_B.default.weight"]
    gate_up_b = gate_up_b.view(len(gate_up_b), -1, count).permute(2, 0, 1)
    gate, up = gate_up_b.chunk(2, 1)
    down_b = theirs[f"{name}.lora_B.default.weight"]
    expected = {
        "lora_A.default.gate_up_proj": gate_up_a,
        "lora_B.default.gate_up_proj": torch.cat((gate[..., :RANK], up[..., RANK:]), 1),
        "lora_A.default.down_proj": theirs[f"{name}.lora_A.default.weight"].view(count, RANK, -1),
        "lora_B.default.down_proj": down_b.view(len(down_b), -1, count).permute(2, 0, 1),
    }
    q = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    for ours, other in ((found[f"{name}.{key}"], value) for key, value in expected.items()):
        assert (ours.double() - other).norm() < 1e-4 * other.norm() and other.norm() > 0
    assert (found[q].double() - theirs[q]).norm() < 1e-4 * theirs[q].norm()


@pytest.mark.parametrize("kept", [False, True])
def test_checkpointing_changes_no_gradient(folders, kept):
    """Nor does keeping the outputs of the first run for the second."""
    from torch.utils.checkpoint import checkpoint

    layer = randomize(adapted(actor(folders[0]))).get_submodule(EXPERTS)
    assert isinstance(layer, NVFP4LoraExperts)
    x, index, gradients = torch.randn(9, 128), torch.randint(0, 4, (9, 2)), []
    index[:, 1] = (index[:, 0] + 1) % 4
    for again in (False, True):
        leaf, weights = x.clone().requires_grad_(), torch.full((9, 2), 0.4, requires_grad=True)
        outputs = KeptOutputs()
        contexts = {"context_fn": lambda p=outputs: (p.recording(), p.replaying())} if kept else {}
        y = (
            checkpoint(layer, leaf, index, weights, use_reentrant=False, **contexts)
            if again
            else layer(leaf, index, weights)
        )
        layer.zero_grad()
        y.square().sum().backward()
        gradients.append([leaf.grad, weights.grad, *(p.grad.clone() for p in layer.parameters() if p.requires_grad)])
    assert len(gradients[0]) == 6
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second) and first.abs().max() > 0


def test_a_disabled_adapter_is_the_base(folders):
    model = randomize(adapted(actor(folders[0])))
    found = log_probabilities(model, PROMPTS[0])
    with model.disable_adapter():
        assert torch.equal(log_probabilities(model, PROMPTS[0]), log_probabilities(actor(folders[0]), PROMPTS[0]))
    assert not torch.equal(found, log_probabilities(actor(folders[0]), PROMPTS[0]))


def test_names_go_both_ways(folders):
    tensors = load_file(folders[1] / "adapter_model.safetensors")
    stacked = stack_experts(tensors)
    assert len(stacked) == 2 * 8 + 4 and len(tensors) == 2 * 8 + 2 * 12
    a = stacked[f"{EXPERTS}.lora_A.gate_up_proj"]
    assert torch.equal(a[3, RANK:], tensors[f"{EXPERTS}.3.up_proj.lora_A.weight"])
    back = split_experts(stacked)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert {name for name in adaptable_shapes(folders[0]) if is_of_experts(name)} == {
        f"model.layers.0.mlp.experts.{e}.{linear}" for e in range(4) for linear in PROJECTIONS
    }
    assert module_targets(TARGETS) == ["experts", "q_proj"] and module_targets(["q_proj"]) == ["q_proj"]
    assert sorted(linear_targets(module_targets(TARGETS))) == sorted(TARGETS)


REFUSED = [
    # changes of adapter_config.json, and the message
    ({"target_modules": ["q_proj", "gate_proj"]}, "4 of the 12 linears of the experts would have an adapter"),
    ({"exclude_modules": ["up_proj"]}, "8 of the 12 linears of the experts would have an adapter"),
    ({"use_rslora": True}, "use_rslora in its adapter_config.json: on experts PEFT scales"),
    ({"target_parameters": ["down_proj"]}, "target_parameters="),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_adapters_that_stock_peft_would_take_differently_are_refused(folders, tmp_path, changes, message):
    config = json.loads((folders[1] / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    shapes = {n: tuple(t.shape) for n, t in load_file(folders[1] / "adapter_model.safetensors").items()}
    with pytest.raises(AdapterError, match=message):
        map_names(shapes, read_adapter_config(tmp_path), adaptable_shapes(folders[0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 is not supported on experts"),
        ({"use_rslora": True}, "use_rslora=True is not supported on experts"),
        ({"init_lora_weights": "pissa"}, "reads the base weight, which is packed"),
    ],
)
def test_what_a_layer_does_not_do_it_refuses(folders, settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(actor(folders[0]), target_modules=list(PROJECTIONS), **settings)


def test_no_merging_into_the_packed_base(folders):
    layer = adapted(actor(folders[0])).get_submodule(EXPERTS)
    with pytest.raises(ValueError, match="lost when it is rounded"):
        layer.merge()
    with pytest.raises(ValueError, match="never merged"):
        layer.unmerge()


def test_a_dense_models_targets_stay(folders):
    """Its gate_proj, up_proj and down_proj are linears."""
    config = LoraConfig(target_modules=TARGETS)
    assert register_nvfp4(copy.copy(config), torch.nn.Linear(2, 2)).target_modules == config.target_modules
