"""Tests GPTQ over a checkpoint: better than rounding on held-out text, repeatable, resumable,
plain NVFP4."""

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.nvfp4 import decoder as decoder_module
from qerl_verl.nvfp4 import layerwise
from qerl_verl.nvfp4.architectures import automatic_class, get_architecture, supported_architectures
from qerl_verl.nvfp4.calibration import Calibration
from qerl_verl.nvfp4.checkpoint_files import load_hf_config, read_headers
from qerl_verl.nvfp4.decoder import LayerwiseDecoder
from qerl_verl.nvfp4.errors import CheckpointError
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.nvfp4.quantizers import round_weight
from qerl_verl.nvfp4.validation import validate_nvfp4_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def _written(tmp_path_factory):
    return tmp_path_factory.mktemp("written"), {}


@pytest.fixture
def shared_model_and_text(make_checkpoint, _written):
    """Returns a checkpoint, and text of different lengths that its own model has written.

    There are 64 sequences, 16 of them held out. Tests share the folder and only read it.
    """
    root, made = _written

    def make(architecture="LlamaForCausalLM", **config):
        key = repr((architecture, sorted(config.items())))
        if key not in made:
            folder = shutil.move(make_checkpoint(architecture, **config), root / str(len(made)))
            made[key] = folder, _write_text(folder)
        return made[key]

    return make


@pytest.fixture
def model_and_text(shared_model_and_text, tmp_path):
    """Returns :func:`shared_model_and_text` with a copy of the folder."""

    def make(*arguments, **config):
        folder, text = shared_model_and_text(*arguments, **config)
        return shutil.copytree(folder, tmp_path / "src"), text

    return make


def _write_text(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # the fixture's weights are so small that layers hardly matter
    for parameter in model.parameters():
        parameter.data *= 2 if parameter.ndim == 2 else 1
    model.to(torch.bfloat16).save_pretrained(folder)
    model.float()
    torch.manual_seed(0)
    start = torch.randint(96, (64, 1))
    written = model.generate(start, do_sample=True, max_new_tokens=39, min_new_tokens=39, top_k=0, pad_token_id=0)
    sequences = tuple((tuple(ids[: 20 + i % 21].tolist()), i % 3) for i, ids in enumerate(written))
    return Calibration(sequences[:48], sequences[48:], "the model itself")


@pytest.fixture
def undisturbed(_written, shared_model_and_text):
    """Returns the folder of an undisturbed GPTQ run on :func:`shared_model_and_text`, and those
    two."""
    root, _ = _written
    folder, text = shared_model_and_text()
    if not (root / "gptq").exists():
        quantize_checkpoint(folder, root / "gptq", method="gptq", calibration=text, progress=False)
    return root / "gptq", folder, text


def report(folder):
    return json.loads((folder / "qerl_report.json").read_text())


def load(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# --- the decoder, one layer at a time ---


@pytest.mark.parametrize(
    "architecture, config",
    [(name, {}) for name in supported_architectures()]
    + [
        ("MistralForCausalLM", dict(sliding_window=7)),
        ("Qwen2ForCausalLM", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
        ("LlamaForCausalLM", dict(rope_parameters=dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0,
                                  high_freq_factor=4.0, original_max_position_embeddings=16), tie_word_embeddings=True)),
    ],
)  # fmt: skip
def test_layer_by_layer_is_the_model(make_checkpoint, architecture, config):
    """Hidden states of padded batches after the last layer equal those of each sequence alone."""
    folder = make_checkpoint(architecture, **config)
    decoder = LayerwiseDecoder(load_hf_config(folder), read_headers(folder), CPU)
    sequences = [(list(range(3, 3 + length)), begin) for length, begin in ((9, 4), (30, 0), (17, 1), (30, 29))]
    batches = decoder.embed(sequences)
    for index in range(len(decoder)):
        layer = decoder.load_layer(index)
        for activations in batches:
            activations.advance(layer, index)
        decoder.drop_layer(index)
        assert all(parameter.is_meta for parameter in layer.parameters())
    (batch,) = batches
    row = get_architecture({"architectures": [architecture]})
    model = automatic_class(row).from_pretrained(folder, dtype=torch.float32)
    norm = model.get_submodule(f"{row.decoder}norm")
    by_length = sorted(sequences, key=lambda s: len(s[0]), reverse=True)
    total, tokens = 0.0, 0
    for place, (ids, begin) in enumerate(by_length):
        output = model(torch.tensor([ids]), output_hidden_states=True)
        got = batch.hidden[place, : len(ids)]
        assert batch.inside[place].sum() == len(ids)
        want_logits = output.logits[0]
        scored = range(max(begin, 1) - 1, len(ids) - 1)
        assert batch.scored[place].nonzero().flatten().tolist() == list(scored)
        total -= sum(want_logits[i].log_softmax(-1)[ids[i + 1]].item() for i in scored)
        tokens += len(scored)
        assert torch.allclose(norm(got), output.hidden_states[-1][0], atol=1e-4)
    compared = decoder.compare(batches, batches)
    assert compared["tokens"] == tokens and compared["kl"] == pytest.approx(0, abs=1e-6)
    assert compared["loss"] == compared["reference_loss"] == pytest.approx(total / tokens, rel=1e-4)


def test_small_batches_give_the_same(make_checkpoint, monkeypatch):
    folder = make_checkpoint()
    decoder = LayerwiseDecoder(load_hf_config(folder), read_headers(folder), CPU)
    sequences = [(list(range(length)), 0) for length in (5, 40, 12, 33)]
    monkeypatch.setitem(decoder_module._BATCH_TOKENS, "cpu", 50)
    assert [a.tokens.shape for a in decoder.embed(sequences)] == [(1, 40), (1, 33), (2, 12)]


# --- gptq ---


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", pytest.param("Qwen3ForCausalLM", marks=pytest.mark.slow)])
def test_gptq_beats_rounding(model_and_text, tmp_path, architecture):
    """The loss and the predictions on held-out text are better, though the weights get worse."""
    folder, text = model_and_text(architecture)
    for method in ("rtn", "four-over-six", "gptq"):
        quantize_checkpoint(folder, tmp_path / method, method=method, calibration=text, progress=False)
        validate_nvfp4_checkpoint(tmp_path / method)
    rtn, six, gptq = (report(tmp_path / method) for method in ("rtn", "four-over-six", "gptq"))
    assert gptq["text"]["kl"] < 0.8 * min(rtn["text"]["kl"], six["text"]["kl"])
    assert gptq["text"]["reference_loss"] == rtn["text"]["reference_loss"]
    kind = "mlp.gate_proj"
    assert gptq["kinds"][kind]["weight_error"] > rtn["kinds"][kind]["weight_error"] > six["kinds"][kind]["weight_error"]


def test_gptq_of_experts(model_and_text, tmp_path, monkeypatch):
    """Each expert is solved from its own tokens, without padding."""
    folder, text = model_and_text("Qwen3MoeForCausalLM")
    counts, hessians = {}, layerwise._hessians

    def counted(layer, index, stream, names):
        found = hessians(layer, index, stream, names)
        counts[index] = {name: hessian.count for name, hessian in found.items()}
        return found

    monkeypatch.setattr(layerwise, "_hessians", counted)
    for method in ("four-over-six", "gptq"):
        quantize_checkpoint(folder, tmp_path / method, method=method, calibration=text, progress=False)
        validate_nvfp4_checkpoint(tmp_path / method)
    tokens = sum(len(ids) for ids, _ in text.sequences)
    of_experts = {name: count for name, count in counts[0].items() if ".experts." in name}
    # two experts per token
    assert sum(c for n, c in of_experts.items() if n.endswith("gate_proj")) == 2 * tokens
    assert all(of_experts[n] == of_experts[n.replace("gate_proj", "down_proj")] for n in of_experts if "gate" in n)
    assert counts[0]["self_attn.q_proj"] == tokens
    six, gptq = (report(tmp_path / method) for method in ("four-over-six", "gptq"))
    assert gptq["text"]["kl"] < 0.8 * six["text"]["kl"]


def test_gptq_of_an_expert_without_tokens_rounds_to_nearest():
    weights = {name: torch.randn(48, 128) for name in ("gate_proj", "up_proj")}
    solved = layerwise._gptq_group(weights, torch.zeros(128, 128))
    for name, weight in weights.items():
        rounded = round_weight(weight, solved[name].global_scale, "four-over-six")
        assert torch.equal(solved[name].packed, rounded.packed)
        assert torch.equal(solved[name].scale.view(torch.uint8), rounded.scale.view(torch.uint8))


def test_gptq_is_plain_nvfp4(model_and_text, tmp_path):
    """transformers loads it through compressed-tensors, which decodes the weights that we
    decode."""
    folder, text = model_and_text("Qwen2ForCausalLM", tie_word_embeddings=True)
    quantize_checkpoint(folder, tmp_path / "dst", method="gptq", calibration=text, progress=False)
    output = load(tmp_path / "dst")
    linears = [name.removesuffix(".weight_packed") for name in output if name.endswith(".weight_packed")]
    assert len(linears) == 14
    for linear in linears:
        parts = {part: output[f"{linear}.{part}"] for part in ("weight_packed", "weight_scale", "weight_global_scale")}
        theirs = NVFP4PackedCompressor.decompress(parts, preset_name_to_scheme("NVFP4A16", ["Linear"]))["weight"]
        ours = dequantize_nvfp4(*parts.values())
        assert (theirs.view(torch.int16).int() - ours.view(torch.int16).int()).abs().max() <= 1
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for linear in linears:
        parts = (output[f"{linear}.weight_{part}"] for part in ("packed", "scale", "global_scale"))
        reference.get_submodule(linear).weight.data = dequantize_nvfp4(*parts)
    tokens = torch.arange(20).view(2, 10)
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype=torch.bfloat16)(tokens).logits.float()
    want = reference(tokens).logits.float()
    assert (got - want).norm() < 0.01 * want.norm()


def test_gptq_twice_gives_the_same_bytes_and_leaves_nothing(undisturbed, tmp_path):
    once, folder, text = undisturbed
    quantize_checkpoint(folder, tmp_path / "again", method="gptq", calibration=text, progress=False)
    assert contents(tmp_path / "again") == contents(once)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again"]
    manifest = json.loads((tmp_path / "again" / "qerl_manifest.json").read_text())
    assert manifest["method"] == "gptq" and manifest["calibration"]["sha256"] == text.key


class Killed(BaseException):
    """An exception that no handler catches."""


@pytest.mark.parametrize("killed_at", ["second layer", "writing"])
def test_gptq_goes_on_where_it_was_killed(undisturbed, tmp_path, monkeypatch, killed_at):
    whole, folder, text = undisturbed
    solved, solve = [], layerwise._gptq_group

    def counted(weights, hessian):
        if killed_at == "second layer" and len(solved) == 5:
            raise Killed
        solved.append(list(weights))
        return solve(weights, hessian)

    def no_writing(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "_gptq_group", counted)
        if killed_at == "writing":
            patch.setattr("qerl_verl.nvfp4.quantize.write_weights", no_writing)
        with pytest.raises(Killed):
            quantize_checkpoint(folder, tmp_path / "dst", method="gptq", calibration=text, progress=False)
    assert not (tmp_path / "dst").exists()
    (layers,) = tmp_path.glob("dst.layers-*")
    finished = ["layer-00000.safetensors", "layer-00001.safetensors"][: 1 if killed_at == "second layer" else 2]
    assert sorted(p.name for p in layers.iterdir()) == finished
    (layers / f"{0:032x}.tmp").write_bytes(b"left by a kill")

    solved.clear()
    monkeypatch.setattr(layerwise, "_gptq_group", counted)
    killed_at = "no more"
    quantize_checkpoint(folder, tmp_path / "dst", method="gptq", calibration=text, progress=False)
    assert len(solved) == 4 * (2 - len(finished))  # four groups per layer
    assert contents(tmp_path / "dst") == contents(whole)
    assert not list(tmp_path.glob("dst.*"))


def test_another_text_does_not_go_on_with_these_layers(model_and_text, tmp_path, monkeypatch):
    folder, text = model_and_text()
    finished = layerwise.FinishedLayers(tmp_path / "dst", "0" * 16)
    finished.folder.mkdir()
    (finished.folder / "layer-00000.safetensors").write_bytes(b"of another text")
    quantize_checkpoint(folder, tmp_path / "dst", method="gptq", calibration=text, progress=False)
    validate_nvfp4_checkpoint(tmp_path / "dst")
    assert finished.folder.exists()  # it holds a file of unknown origin


def test_full_disk_while_layers_are_kept(model_and_text, tmp_path, monkeypatch):
    folder, text = model_and_text()
    save, calls = layerwise.save_file, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise layerwise.SafetensorError("I/O error: No space left on device (os error 28)")
        save(*args, **kwargs)

    monkeypatch.setattr(layerwise, "save_file", full)
    with pytest.raises(CheckpointError, match="was full.*finished are kept in .*dst.layers-"):
        quantize_checkpoint(folder, tmp_path / "dst", method="gptq", calibration=text, progress=False)
    (layers,) = tmp_path.glob("dst.layers-*")
    assert [p.name for p in layers.iterdir()] == ["layer-00000.safetensors"]


def test_activations_that_are_not_finite_are_named(model_and_text, tmp_path):
    folder, text = model_and_text()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"].fill_(3e38)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.\d+\.\S+: the Hessian holds NaN or Inf"):
        quantize_checkpoint(folder, tmp_path / "dst", method="gptq", calibration=text, progress=False)


def test_gptq_needs_a_text(make_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="--calibration"):
        quantize_checkpoint(make_checkpoint(), tmp_path / "dst", method="gptq", progress=False)


def test_what_somebody_else_put_beside_the_finished_layers_stays(tmp_path):
    finished = layerwise.FinishedLayers(tmp_path / "dst", "0123")
    finished.folder.mkdir(parents=True)
    for name in ("layer-00000.safetensors", f"{'0' * 32}.tmp", "notes.txt", "layer-mine.safetensors"):
        (finished.folder / name).touch()
    finished.remove()
    assert sorted(path.name for path in finished.folder.iterdir()) == ["layer-mine.safetensors", "notes.txt"]
