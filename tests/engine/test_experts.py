"""Tests experts in verl's FSDP2 engine: sharded, compiled, recomputed, in a critic, in 16 bits."""

import json

import pytest
import torch

from qerl_verl.engine.compile import unavailable
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.quickstart.tiny_model import build_tokenizer
from tests.helpers.tiny_families import make_family

FLOAT32 = {
    "use_remove_padding": True,
    "packed_attention": True,
    "mixed_precision": {"param_dtype": "fp32", "reduce_dtype": "fp32"},
    "lr_warmup_steps": 0,
    "steps": 3,
}
ADAPTED = FLOAT32 | {"target_modules": ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]}
REPLAYED = FLOAT32 | {"replay": True, "routing": [2, 4, 2]}
ONE = {
    "one": FLOAT32,
    "selective": FLOAT32 | {"recompute": "selective"},
    "stored": FLOAT32 | {"gradient_checkpointing": False},
    "padded": FLOAT32 | {"use_remove_padding": False, "packed_attention": False},
    "chunks": FLOAT32 | {"use_fused_kernels": True},
    "compiled": FLOAT32 | {"use_torch_compile": True, "recompute": "selective"},
    "bf16": {"arm": "bf16"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns a mixture of experts in 16 bits and packed."""
    folder, tokenizer = tmp_path_factory.mktemp("experts"), build_tokenizer()
    source = make_family("Qwen3MoeForCausalLM", folder / "source", vocab_size=len(tokenizer), mlp_only_layers=[])
    tokenizer.save_pretrained(source)
    quantize_checkpoint(source, folder / "packed", progress=False)
    return source, folder / "packed"


@pytest.fixture(scope="module")
def reports(run_engine, tmp_path_factory, folders):
    """Returns the reports of one rank, and of two."""
    out, (source, packed) = tmp_path_factory.mktemp("reports"), folders
    one = ONE | {"bf16": ONE["bf16"] | FLOAT32 | {"base": str(source)}}
    saved = str(out / "saved" / "actor")
    one |= {
        "adapted": ADAPTED | {"save": saved},
        "adapted selective": ADAPTED | {"recompute": "selective"},
        "adapted stored": ADAPTED | {"gradient_checkpointing": False},
        "adapted offloaded": ADAPTED | {"param_offload": True, "layered_summon": True},
        "replayed selective": REPLAYED | {"recompute": "selective"},
        "replayed stored": REPLAYED | {"gradient_checkpointing": False},
        "replayed padded": REPLAYED | {"use_remove_padding": False, "packed_attention": False},
        "replayed": REPLAYED | {"steps": 1, "reference": True},
        "unreplayed": FLOAT32 | {"steps": 1, "reference": True},
        "replayed three": REPLAYED,
        "loaded": ADAPTED | {"steps": 1, "load": saved},
        "adopted": FLOAT32 | {"steps": 1, "lora_adapter_path": f"{saved}/lora_adapter"},
    }
    (first,) = run_engine(packed, out / "one", variants=one)
    counted = {"two": FLOAT32, "counted": {"steps": 1, "count": True}, "adapted two": ADAPTED}
    counted |= {"replayed two": REPLAYED, "replayed ulysses": REPLAYED | {"ulysses": 2}}
    return first, run_engine(packed, out / "two", world=2, variants=counted)


@pytest.mark.parametrize("name", ["selective", "stored", "padded", "chunks", "compiled", "two"])
def test_experts_train_the_same(reports, name):
    """This holds for every choice of recomputation and layout of sequences, between compiled
    kernels, and on two ranks that share the bytes.
    """
    one, two = reports
    found = one[name] if name in one else two[0][name]
    tight = name in ("selective", "stored")  # the same kernels on the same numbers
    for what in ("loss", "grad_norm"):
        assert len(found[what]) == 3 and found[what] == pytest.approx(
            one["one"][what], rel=0 if tight else 1e-4, abs=1e-6
        )
    assert len(set(one["one"]["loss"])) == 3 and min(one["one"]["grad_norm"]) > 0
    if name == "compiled" and unavailable(torch.device("cpu")) is None:
        assert found["compiled"]["norms"] == 2 * 4 + 1


@pytest.mark.parametrize("name", ["adapted selective", "adapted stored", "adapted offloaded", "adapted two"])
def test_adapters_on_the_experts_train_the_same(reports, name):
    """With other things computed twice, offloaded, and sharded on two ranks."""
    one, two = reports
    found = one[name] if name in one else two[0][name]
    for what in ("loss", "grad_norm"):
        assert found[what] == pytest.approx(one["adapted"][what], rel=1e-4 if name == "adapted two" else 0, abs=1e-6)
    assert one["adapted"]["grad_norm"] != one["one"]["grad_norm"] and len(set(one["adapted"]["loss"])) == 3
    if name != "adapted two":
        assert found["adapter"] == one["adapted"]["adapter"]


@pytest.mark.parametrize(
    "name", ["replayed selective", "replayed stored", "replayed padded", "replayed two", "replayed ulysses"]
)
def test_the_rollouts_routing_is_replayed_the_same(reports, name):
    """However sequences are laid out, with layers that run twice, and on two ranks."""
    one, two = reports
    found, expected = one[name] if name in one else two[0][name], one["replayed three"]
    tight = name in ("replayed selective", "replayed stored")
    for what in ("loss", "grad_norm"):
        assert found[what] == pytest.approx(expected[what], rel=0 if tight else 1e-4, abs=1e-6)
    assert expected["grad_norm"][0] != pytest.approx(one["one"]["grad_norm"][0], rel=1e-3)


def test_the_reference_chooses_its_experts_by_itself(reports):
    """The policy that is trained follows the rollout; the base beneath it did not sample."""
    one, _ = reports
    assert one["replayed"]["without"] == one["unreplayed"]["without"]
    difference = torch.tensor(one["replayed"]["with"]) - torch.tensor(one["unreplayed"]["with"])
    assert difference.abs().max() > 1e-2


def test_an_adapter_on_the_experts_is_saved_and_goes_on(reports):
    """From verl's checkpoint, and from the folder in PEFT's format, whose names are the
    linears'."""
    one, _ = reports
    assert one["loaded"]["loaded"] == one["adopted"]["built"] == one["adapted"]["adapter"]
    config = json.loads(bytes(one["adapted"]["peft_config"]))
    assert sorted(config["target_modules"]) == sorted(ADAPTED["target_modules"])
    assert one["adopted"]["peft_config"] and one["adapted"]["built"] != one["one"]["built"]


def test_every_rank_computes_with_the_checkpoints_bytes(reports):
    _, two = reports
    assert [report["counted"]["changed_bytes"] for report in two] == [0, 0]


def test_adapters_are_the_same_in_16_bits(reports):
    """The arm bf16 has transformers' experts, and its adapter is on the same layers."""
    one, _ = reports
    assert one["bf16"]["built"] == one["one"]["built"] and min(one["bf16"]["grad_norm"]) > 0


def test_a_critic_of_experts(run_engine, folders, tmp_path):
    (report,) = run_engine(folders[1], tmp_path / "r", model_type="value_model", steps=3)
    assert report["class"] == "NVFP4EngineWithValueHead"
    packed = [name for name in report["parameters"] if name.endswith("experts.weight_joined")]
    assert len(packed) == 2 and not any(report["parameters"][name]["trains"] for name in packed)
    assert all(step["grad_norm"] > 0 for step in report["steps"])
    assert len({step["loss"] for step in report["steps"]}) == 3
