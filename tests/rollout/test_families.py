"""Tests every family of the table in a vLLM engine, against the actor and a float64 model."""

import copy
import importlib.util
import json

import pytest
import torch

from qerl_verl.aqn.noise import draw_noise
from qerl_verl.nvfp4.architectures import get_architecture
from qerl_verl.nvfp4.checkpoint_files import read_config
from qerl_verl.nvfp4.loading import iterate_tensors
from qerl_verl.nvfp4.model_shapes import adaptable_shapes
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from tests.helpers.observers import observe
from tests.helpers.tiny_families import (
    FAMILIES,
    TOWERS,
    Reference,
    log_probabilities,
    make_adapter,
    make_family,
    root_mean_square,
)
from tests.helpers.tiny_vision import image_prompts, processed, vision_settings, write_processor

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="drives vLLM's CPU engine"),
]

QUICK = ("Gemma3ForCausalLM", "Phi3ForCausalLM", "SmolLM3ForCausalLM", "Qwen3MoeForCausalLM")
"""Norms of their own, linears that the checkpoint fuses, a model that vLLM runs through
transformers' code, a mixture of experts."""
PROMPTS = [list(range(3, 35)), list(range(90, 50, -1)), [7, 7, 8, 9] * 9]
"""Longer than the sliding windows of the tiny models."""
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
NOISE = {"seed": 3, "step": 5, "sigma": 0.05}
ROUTER = {"router": True}
"""Noise also where a router is fed."""


SERVED = [name for name in FAMILIES if not get_architecture({"architectures": [name]}).delta_nets]
"""Families that vLLM's CPU engine computes in float32."""


def look_at(names, folder):
    """Returns the observations of :mod:`families_process` for these families, and their folders."""
    places, arguments = {}, [json.dumps(PROMPTS), json.dumps(NOISE | ROUTER)]
    for name in names:
        source, quantized, adapter = (folder / name / part for part in ("source", "quantized", "adapter"))
        if name in TOWERS:
            make_family(name, source, **vision_settings())
            write_processor(source, name)
        else:
            make_family(name, source)
        quantize_checkpoint(source, quantized, progress=False)
        make_adapter(adapter, adaptable_shapes(quantized))
        places[name] = quantized, adapter
        arguments += [str(quantized), str(adapter)]
    seen = observe("tests.rollout.families_process", folder, *arguments)
    return {name: (*place, seen[str(place[0])]) for name, place in places.items()}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return look_at(QUICK, tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    names = [name for name in SERVED if name not in QUICK and (name not in TOWERS or HAS_TORCHVISION)]
    return look_at(names, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SERVED]
)
def test_a_family_in_the_rollout(request, name):
    """Log-probabilities are those of a float64 model with the decoded weights: without adapter,
    with one, and with noise on the norms of the row. Removing the noise restores every bit.
    """
    if name in TOWERS and not HAS_TORCHVISION:
        pytest.skip("vLLM's models with a vision tower need torchvision")
    quantized, adapter, seen = request.getfixturevalue("quick" if name in QUICK else "others")[name]
    assert "error" not in seen, seen["error"]
    row, reference = get_architecture(read_config(quantized)), Reference(quantized)
    clean = dict(iterate_tensors(quantized))
    expected = {f"{row.layer_prefix}{i}.{norm}" for i in range(2) for norm in row.noise_targets}
    assert set(seen["norms"]) == expected
    for norm, live in seen["norms"].items():
        weight = clean[f"{norm}.weight"].float()
        z = draw_noise(NOISE["seed"], NOISE["step"], norm, len(weight), NOISE["sigma"])
        assert torch.equal(torch.tensor(live), weight + row.norm_offset + z), norm

    reference.check(PROMPTS, seen["clean"])
    assert seen["taken"] == 2 * len(adaptable_shapes(quantized))
    with reference.adapted(adapter):
        reference.check(PROMPTS, seen["adapted"])
    with reference.noised(expected, **NOISE):
        reference.check(PROMPTS, seen["noised"])
    assert seen["clean_again"] == seen["clean"]
    if name in TOWERS:
        check_images(quantized, adapter, seen, reference)
    if row.experts:
        check_routing(reference.models[1], seen["chosen"])


def check_routing(model, reported):
    """Checks that the experts that vLLM reports for each token, prompts and generated ones, are
    those that transformers' model chooses in the same dtype; zeros for a layer without experts."""
    own = {}
    for name, router in model.named_modules():
        if name.endswith(".mlp.gate"):
            layer = int(name.split(".")[2])
            router.register_forward_hook(lambda _, __, output, at=layer: own.__setitem__(at, output[2]))
    for tokens, chosen in reported:
        with torch.no_grad():
            model(torch.tensor([tokens]), use_cache=False)
        chosen = torch.tensor(chosen)
        assert len(chosen) == len(tokens) and set(own) == {0}
        assert torch.equal(chosen[:, 0].sort(-1).values, own[0].sort(-1).values)
        assert len(own[0].unique()) > 2 and not chosen[:, 1].any()


def check_images(quantized, adapter, seen, reference):
    """Checks prompts with an image; the tower is in 16 bits, and only the decoder has an
    adapter."""
    ids, images = seen["image_tokens"], [image for _, image in image_prompts()]
    inputs = [processed(quantized, tokens, image) for tokens, image in zip(ids, images, strict=True)]
    reference.check(ids, seen["image_clean"], inputs)
    with reference.adapted(adapter):
        reference.check(ids, seen["image_adapted"], inputs)
    assert all("visual" not in layer for layer in seen["layers"])


NET = "model.layers.0.linear_attn"


def save_in_16_bits(model, folder):
    """Writes the weights of a model in bfloat16 and returns what transformers computes with
    them."""
    rounded = copy.deepcopy(model).bfloat16()
    rounded.config.dtype = torch.bfloat16
    rounded.save_pretrained(folder)
    return torch.cat([log_probabilities(rounded, prompt) for prompt in PROMPTS])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TORCHVISION, reason="the file of vLLM that has the model needs torchvision")
def test_a_model_with_delta_nets_in_the_rollout(tmp_path):
    """vLLM computes delta nets in bfloat16 alone on a CPU. Log-probabilities without adapter, with
    one, and under noise are as near to the float64 model's as those of transformers in bfloat16,
    and so are those of vLLM's own engine on the decoded weights.
    """
    quantized, adapter = tmp_path / "quantized", tmp_path / "adapter"
    quantize_checkpoint(make_family("Qwen3_5ForCausalLM", tmp_path / "source"), quantized, progress=False)
    make_adapter(adapter, adaptable_shapes(quantized))
    reference, row = Reference(quantized), get_architecture(read_config(quantized))
    norms = {f"{row.layer_prefix}{i}.{norm}" for i in range(2) for norm in row.noise_targets}
    exact, rounded = {}, {}

    def look(name):
        model = reference.models[0]
        exact[name] = torch.cat([log_probabilities(model, prompt) for prompt in PROMPTS])
        rounded[name] = save_in_16_bits(model, tmp_path / name)

    look("clean")
    with reference.adapted(adapter):
        look("adapted")
    with reference.noised(norms, **NOISE):
        look("noised")
    settings = json.dumps(PROMPTS), json.dumps(NOISE)
    folders = quantized, adapter, *(tmp_path / name for name in exact)
    seen = observe("tests.rollout.delta_nets_process", tmp_path, *settings, *folders)
    assert "error" not in seen, seen["error"]
    ours = seen["ours"]

    assert ours["layers"][f"{NET}.in_proj_qkvz"] == [128, 256, 512, 768]  # q, k, v and z
    assert f"{NET}.in_proj_ba" not in ours["layers"]
    assert ours["taken"] == 2 * len(adaptable_shapes(quantized)) and set(ours["norms"]) == norms
    clean = dict(iterate_tensors(quantized))
    for norm, live in ours["norms"].items():
        weight = clean[f"{norm}.weight"].float()
        z = draw_noise(NOISE["seed"], NOISE["step"], norm, len(weight), NOISE["sigma"])
        assert torch.equal(torch.tensor(live), weight + row.norm_offset + z), norm
    assert ours["clean_again"] == ours["clean"]
    for name in exact:
        rounding = root_mean_square(rounded[name] - exact[name])
        values = (torch.tensor(sum(found[name], []), dtype=torch.float64) for found in (ours, seen["vllm"]))
        found, stock = values
        for which, difference in (
            ("ours", found - exact[name]),
            ("vLLM's", stock - exact[name]),
            ("between the two", found - stock),
        ):
            error = root_mean_square(difference)
            print(f"{name}, {which}: {error:.1e}; of transformers in bfloat16 {rounding:.1e}")
            assert error < Reference.MARGIN * rounding, (name, which)
    changes = [root_mean_square(exact[name] - exact["clean"]) for name in ("adapted", "noised")]
    assert min(changes) > 5 * root_mean_square(rounded["clean"] - exact["clean"])  # each of them is seen
