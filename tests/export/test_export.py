"""Tests that PEFT, transformers and compressed-tensors load exported adapters and models."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qerl_verl.cli.main import main
from qerl_verl.export.locate import find_adapter, find_base
from qerl_verl.export.merge import Base, delta_kept, export_merged, read_deltas
from qerl_verl.nvfp4.cache import fingerprint
from qerl_verl.nvfp4.checkpoint_files import read_config
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.format import read_quantization
from qerl_verl.nvfp4.model_shapes import adaptable_shapes
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from tests.helpers.tiny_families import TOWERS, Reference, log_probabilities, make_family
from tests.helpers.tiny_families import make_adapter as families_adapter

TARGETS = ["q_proj", "o_proj", "down_proj"]


def make_adapter(folder, model, std=0.02, **config):
    """Returns a PEFT adapter of rank 4 with random A and B on some of the linears of ``model``."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **config}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, bf16_checkpoint, nvfp4_checkpoint):
    """Returns a ``global_step_5`` as a run leaves it: the adapter, and a record of the base."""
    step = tmp_path_factory.mktemp("run") / "global_step_5"
    make_adapter(step / "actor" / "lora_adapter", bf16_checkpoint)
    record = {"files": {}, "base": {"actor": fingerprint(nvfp4_checkpoint, step.parent)}}
    (step / "qerl_checkpoint.json").write_text(json.dumps(record))
    return step


def test_an_arm_whose_base_is_the_model_itself_records_its_name_too(run, bf16_checkpoint, tmp_path):
    base = fingerprint(bf16_checkpoint, tmp_path)
    (tmp_path / "actor").symlink_to(run / "actor")
    (tmp_path / "qerl_checkpoint.json").write_text(json.dumps({"base": {"actor": f"bf16-{base}"}}))
    assert find_adapter(tmp_path).base_fingerprint == base
    assert find_base(find_adapter(tmp_path), cache_dir=tmp_path) == bf16_checkpoint


def logits(model):
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


@pytest.fixture(scope="module")
def expected(run, dequantized_checkpoint):
    """Returns the log-probabilities of the decoded base with the adapter, in float32."""
    base = AutoModelForCausalLM.from_pretrained(dequantized_checkpoint, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, run / "actor" / "lora_adapter"))


def test_the_merged_model_computes_what_base_and_adapter_do(run, expected, nvfp4_checkpoint, tmp_path):
    done = export_merged(nvfp4_checkpoint, find_adapter(run).adapter, tmp_path / "m", device="cpu", progress=False)
    assert done == {"linears": 14, "adapted": 6}
    assert read_quantization(tmp_path / "m") == "none"
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32))
    # Each of the weights is rounded to bfloat16 once; about ten of them stand behind each other in
    # the model.
    assert (found - expected).norm() / expected.norm() < 10 * torch.finfo(torch.bfloat16).eps


def test_the_adapter_is_in_the_merged_weights(run, nvfp4_checkpoint, dequantized_checkpoint, tmp_path):
    export_merged(nvfp4_checkpoint, find_adapter(run).adapter, tmp_path / "m", device="cpu", progress=False)
    found, base = (
        load_file(tmp_path / "m" / "model.safetensors"),
        load_file(dequantized_checkpoint / "model.safetensors"),
    )
    adapter = load_file(run / "actor" / "lora_adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(found[f"{name}.weight"], (base[f"{name}.weight"] + 2 * b @ a).bfloat16(), rtol=0, atol=0)
    other = "model.layers.1.self_attn.k_proj.weight"
    torch.testing.assert_close(found[other], base[other].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_the_scaling_is_the_adapters(bf16_checkpoint, nvfp4_checkpoint, tmp_path, rslora, scaling):
    adapter = make_adapter(tmp_path / "a", bf16_checkpoint, use_rslora=rslora)
    assert read_deltas(adapter, nvfp4_checkpoint).scaling == scaling


def test_a_base_in_16_bits_is_merged_too(run, bf16_checkpoint, tmp_path):
    export_merged(bf16_checkpoint, find_adapter(run).adapter, tmp_path / "m", device="cpu", progress=False)
    base = AutoModelForCausalLM.from_pretrained(bf16_checkpoint, dtype=torch.float32)
    wanted = logits(PeftModel.from_pretrained(base, run / "actor" / "lora_adapter"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32))
    assert (found - wanted).norm() / wanted.norm() < 10 * torch.finfo(torch.bfloat16).eps


def test_fp8_is_what_compressed_tensors_reads(run, expected, nvfp4_checkpoint, tmp_path):
    export_merged(nvfp4_checkpoint, find_adapter(run).adapter, tmp_path / "f", "fp8", device="cpu", progress=False)
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    weight, scale = (tensors[f"model.layers.0.mlp.up_proj.{part}"] for part in ("weight", "weight_scale"))
    assert weight.dtype == torch.float8_e4m3fn and scale.shape == (weight.shape[0], 1)
    assert AutoConfig.from_pretrained(tmp_path / "f").quantization_config["format"] == "float-quantized"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "f", dtype=torch.float32)
    found = logits(model)
    # E4M3 has three bits of mantissa, and the activations are rounded to it as well.
    assert (found - expected).norm() / expected.norm() < 10 * 2.0**-4
    exact = Base(nvfp4_checkpoint).weight("model.layers.0.mlp.up_proj", torch.device("cpu"))
    assert ((weight.float() * scale - exact).abs() <= exact.abs() * 2.0**-4 + scale * 2.0**-9).all()


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """Returns folders of a mixture of experts: 16 bits with experts stacked, quantized, and an
    adapter.
    """
    folder = tmp_path_factory.mktemp("mixture")
    source, packed, adapter = (folder / name for name in ("source", "packed", "adapter"))
    model = AutoModelForCausalLM.from_pretrained(make_family("Qwen3MoeForCausalLM", folder / "apart"))
    model.save_pretrained(source, save_original_format=False)
    quantize_checkpoint(source, packed, progress=False)
    families_adapter(adapter, adaptable_shapes(packed))
    return source, packed, adapter


ROUTER, EXPERT = "model.layers.0.mlp.gate", "model.layers.0.mlp.experts.3.down_proj"


def test_a_mixture_of_experts_is_merged(mixture, tmp_path):
    """The output has one matrix for each expert, which transformers loads, with the deltas of
    attention and experts.
    """
    source, packed, adapter = mixture
    delta = read_deltas(adapter, packed)
    done = export_merged(packed, adapter, tmp_path / "m", device="cpu", progress=False)
    assert done == {"linears": 4 * 3 + 3 + 2 * 4, "adapted": 4 * 3 + 2 * 4}
    tensors, base = load_file(tmp_path / "m" / "model.safetensors"), Base(packed)
    exact = delta.add_to(EXPERT, base.weight(EXPERT, torch.device("cpu")))
    assert torch.equal(tensors[f"{EXPERT}.weight"], exact.bfloat16())
    assert not torch.equal(exact, base.weight(EXPERT, torch.device("cpu")))
    prompt = list(range(3, 40))
    reference, found = Reference(packed), AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with reference.adapted(adapter):
        expected = log_probabilities(reference.models[0], prompt)
    assert (log_probabilities(found, prompt) - expected).norm() / expected.norm() < 10 * torch.finfo(torch.bfloat16).eps
    # stacked, in 16 bits
    export_merged(source, adapter, tmp_path / "s", device="cpu", progress=False)
    merged = load_file(tmp_path / "s" / "model.safetensors")
    assert merged.keys() == tensors.keys()
    stack = load_file(source / "model.safetensors")["model.layers.0.mlp.experts.down_proj"]
    assert torch.equal(merged[f"{EXPERT}.weight"], delta.add_to(EXPERT, stack[3].float()).bfloat16())


def test_a_mixture_of_experts_in_fp8_leaves_the_routers(mixture, tmp_path):
    _, packed, adapter = mixture
    export_merged(packed, adapter, tmp_path / "f", "fp8", device="cpu", progress=False)
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    assert tensors[f"{EXPERT}.weight"].dtype == torch.float8_e4m3fn and f"{EXPERT}.weight_scale" in tensors
    assert tensors[f"{ROUTER}.weight"].dtype == torch.bfloat16
    assert read_config(tmp_path / "f")["quantization_config"]["ignore"] == ["lm_head", ROUTER]


def test_nvfp4_needs_force_and_tells_what_is_left(run, nvfp4_checkpoint, tmp_path, capsys):
    arguments = ["export", str(run), str(tmp_path / "n"), "--format", "nvfp4", "--base", str(nvfp4_checkpoint)]
    assert main(arguments) == 2
    assert "loses most of the LoRA delta" in capsys.readouterr().err and not (tmp_path / "n").exists()
    assert main([*arguments, "--force", "--device", "cpu"]) == 0
    assert "of the LoRA delta is left" in capsys.readouterr().err
    assert read_quantization(tmp_path / "n") == "nvfp4" and not (tmp_path / "n" / "merged").exists()


def test_what_is_kept_is_all_of_it_in_16_bits(run, nvfp4_checkpoint, tmp_path):
    adapter = find_adapter(run).adapter
    export_merged(nvfp4_checkpoint, adapter, tmp_path / "m", device="cpu", progress=False)
    base, cpu = Base(nvfp4_checkpoint), torch.device("cpu")
    deltas = read_deltas(adapter, nvfp4_checkpoint)
    assert delta_kept(base, deltas, Base(tmp_path / "m"), cpu) == pytest.approx(1, abs=0.01)
    assert delta_kept(base, deltas, base, cpu) == 0


def test_the_adapter_alone(run, nvfp4_checkpoint, tmp_path, capsys):
    arguments = [
        "export",
        str(run),
        str(tmp_path / "a"),
        "--format",
        "adapter",
        "--json",
        "--base",
        str(nvfp4_checkpoint),
    ]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["adapted"] == 6
    source = run / "actor" / "lora_adapter"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in source.iterdir())


def test_the_base_is_found_by_its_fingerprint(run, bf16_checkpoint, nvfp4_checkpoint, tmp_path):
    cache = tmp_path / "cache"
    quantize_checkpoint(bf16_checkpoint, cache / "qwen2-another", method="rtn", progress=False)
    (cache / "qwen2-x").symlink_to(nvfp4_checkpoint)
    source = find_adapter(run)
    assert find_base(source, cache_dir=cache) == cache / "qwen2-x"
    for change, message in (
        (lambda: find_base(source, cache / "qwen2-another", cache), "not those that .* was trained on"),
        (lambda: find_base(source, tmp_path, cache), "--base .*: no config.json there"),
        (lambda: find_base(source, cache_dir=tmp_path / "empty"), "neither .* nor in the cache"),
        (lambda: find_adapter(tmp_path), "no adapter_config.json in it"),
    ):
        with pytest.raises(CheckpointError, match=message):
            change()


def damaged(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(iter(t))), "LoRA tensors that its adapter_config.json promises are not in its file"),
        (lambda t: t.update({next(iter(t)): torch.full_like(next(iter(t.values())), float("nan"))}), "NaN or Inf"),
        (lambda t: t.update({"base_model.model.wq.lora_A.weight": torch.zeros(4, 4)}), "have no place in the model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(bf16_checkpoint, nvfp4_checkpoint, tmp_path, change, message):
    adapter = make_adapter(tmp_path / "a", bf16_checkpoint)
    damaged(adapter, change)
    with pytest.raises(CheckpointError, match=message):
        export_merged(nvfp4_checkpoint, adapter, tmp_path / "m", device="cpu", progress=False)
    assert not (tmp_path / "m").exists()


def test_a_folder_with_something_in_it_is_left_alone(run, nvfp4_checkpoint, tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_merged(nvfp4_checkpoint, find_adapter(run).adapter, tmp_path, device="cpu", progress=False)
    assert (tmp_path / "note").read_text() == "mine"


def test_several_files_have_an_index(run, nvfp4_checkpoint, tmp_path):
    export_merged(
        nvfp4_checkpoint,
        find_adapter(run).adapter,
        tmp_path / "m",
        device="cpu",
        progress=False,
        max_shard_bytes=100_000,
    )
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "quantization_config" not in read_config(tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", TOWERS)
def test_behind_a_vision_tower_the_decoder_alone_changes(tmp_path, name):
    """Log-probabilities are those of base and adapter up to about ten roundings of the form, and
    the tower's bytes are unchanged.
    """
    quantize_checkpoint(make_family(name, tmp_path / "source"), tmp_path / "base", progress=False)
    families_adapter(tmp_path / "adapter", adaptable_shapes(tmp_path / "base"))
    reference, prompt = Reference(tmp_path / "base"), list(range(3, 35))
    with reference.adapted(tmp_path / "adapter"):
        expected = log_probabilities(reference.models[1], prompt)
    for form in ("merged", "fp8"):
        dst = tmp_path / form
        export_merged(tmp_path / "base", tmp_path / "adapter", dst, form, device="cpu", progress=False)
        model = AutoModelForImageTextToText.from_pretrained(dst, dtype=torch.float32)
        error = log_probabilities(model, prompt) - expected
        assert error.square().mean().sqrt() < 10 * {"merged": 2.0**-7, "fp8": 2.0**-4}[form] * expected.std()
        kept = load_file(dst / "model.safetensors")
        tower = {n: t for n, t in load_file(tmp_path / "base" / "model.safetensors").items() if ".visual." in n}
        assert tower and all(torch.equal(kept[n], t) for n, t in tower.items())
