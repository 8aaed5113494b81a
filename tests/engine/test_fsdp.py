"""Tests the training engine in processes of its own: one rank, two gloo ranks, checkpoints,
memory."""

import inspect
import json
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config
from verl.workers.engine.fsdp.transformer_impl import FSDPEngine

from qerl_verl.engine.adapter import AdapterEngineMixin, remove_dropout
from qerl_verl.engine.nvfp4 import NVFP4EngineMixin
from qerl_verl.engine.recompute import Recompute
from qerl_verl.job import Job
from qerl_verl.nvfp4.architectures import automatic_class, get_architecture
from tests.helpers.jobs import sharing_job
from tests.helpers.tiny_families import make_config

ROUNDING = torch.finfo(torch.bfloat16).eps
"""Ranks add in another order, in bfloat16; ``test_many_ranks.py`` compares them in float32."""


@pytest.fixture(scope="module")
def one_rank(run_engine, tmp_path_factory, nvfp4_checkpoint, bf16_checkpoint):
    """Trains four steps on one rank, saved after the second; the user gave the 16-bit model."""
    folder = tmp_path_factory.mktemp("one")
    settings = {"steps": 4, "save_after": 2, "save": str(folder / "ckpt" / "actor")}
    environment = Job(sources={"actor": str(bf16_checkpoint)}).environment()
    return folder, run_engine(nvfp4_checkpoint, folder / "r", environment=environment, **settings)[0]


def test_the_registry_gives_our_engine(one_rank):
    assert one_rank[1]["class"] == "NVFP4EngineWithLMHead"


def test_what_is_packed_takes_its_bytes_and_only_float32_adapters_train(one_rank):
    parameters = one_rank[1]["parameters"]
    packed = {n: p for n, p in parameters.items() if n.endswith(".weight_joined")}
    assert len(packed) == 2 * 7 and not any(n.endswith((".weight_packed", ".weight_scale")) for n in parameters)
    # on a GPU 16 bits would not do, see CARRIER
    assert {p["dtype"] for p in packed.values()} == {"torch.float32"}
    shape = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128), "gate": (256, 128), "up": (256, 128)}
    for name, p in packed.items():
        rows, columns = shape.get(name.split(".")[-3].removesuffix("_proj"), (128, 256))
        assert p["bytes"] == rows * columns // 2 + rows * columns // 16, name
    assert {p["dtype"] for n, p in parameters.items() if p["trains"]} == {"torch.float32"}
    assert all(("lora_" in n) == p["trains"] for n, p in parameters.items())
    rest = {p["dtype"] for n, p in parameters.items() if n not in packed and not p["trains"]}
    assert rest == {"torch.bfloat16"}


def test_training_lowers_the_loss_and_follows_the_scheduler(one_rank):
    steps = one_rank[1]["steps"]
    assert [s["lr"] for s in steps] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert all(s["grad_norm"] > 0 for s in steps)
    assert one_rank[1]["optimizer_steps"] == [4]


def test_a_checkpoint_holds_adapter_optimizer_and_scheduler_but_not_the_base(one_rank):
    folder = one_rank[0] / "ckpt" / "actor"
    state = torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=False)
    assert state and all("lora_" in name for name in state)
    optimizer = torch.load(folder / "optim_world_size_1_rank_0.pt", weights_only=False)
    assert len(optimizer["state"]) == len(state)
    extra = torch.load(folder / "extra_state_world_size_1_rank_0.pt", weights_only=False)
    assert extra["lr_scheduler"]["last_epoch"] == 2
    adapter = load_file(folder / "lora_adapter" / "adapter_model.safetensors")
    assert sorted(adapter) == one_rank[1]["adapter_names"]
    config = json.loads((folder / "lora_adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 8 and "q_proj" in config["target_modules"]


def test_what_the_checkpoint_says_about_merging_holds(one_rank, bf16_checkpoint, tmp_path):
    """Stock PEFT finds the user's 16-bit model and merges; verl's merger fails as the README
    says."""
    from peft import AutoPeftModelForCausalLM
    from verl.model_merger.base_model_merger import ModelMergerConfig
    from verl.model_merger.fsdp_model_merger import FSDPModelMerger

    folder = one_rank[0] / "ckpt" / "actor"
    guide = (folder / "README.md").read_text()
    assert f"is a PEFT adapter of {bf16_checkpoint}." in guide
    model = AutoPeftModelForCausalLM.from_pretrained(folder / "lora_adapter", dtype="bfloat16").merge_and_unload()
    before = load_file(next(bf16_checkpoint.glob("*.safetensors")))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert model.state_dict().keys() >= before.keys() and not torch.equal(model.state_dict()[name], before[name])

    settings = {
        "operation": "merge",
        "backend": "fsdp",
        "local_dir": str(folder),
        "target_dir": str(tmp_path / "merged"),
    }
    with pytest.raises(RuntimeError) as error:
        FSDPModelMerger(
            ModelMergerConfig(hf_model_config_path=str(folder / "huggingface"), **settings)
        ).merge_and_save()
    assert str(error.value).split(" at ")[0] in guide


def test_a_base_that_the_rollout_uses_too_trains_the_same_adapter(run_engine, one_rank, nvfp4_checkpoint, tmp_path):
    """With qerl.base=shared results are equal bit for bit, with verl's offload, which leaves the
    base in place; a checkpoint is equal too.
    """
    sharing = sharing_job().environment()
    save = tmp_path / "ckpt" / "actor"
    settings = {"steps": 4, "save_after": 2, "save": str(save), "param_offload": True, "optimizer_offload": True}
    report = run_engine(nvfp4_checkpoint, tmp_path / "r", environment=sharing, **settings)[0]
    unbroken = one_rank[1]
    assert all(report[what] == unbroken[what] for what in ("built", "steps", "saved", "adapter"))
    frozen = {n for n, p in report["parameters"].items() if not p["trains"]}
    assert frozen and all("norm" in name or name.endswith(".bias") for name in frozen)
    assert "base: the actor uses the" in (tmp_path / "r.0.log").read_text()
    state, expected = (
        torch.load(folder / "model_world_size_1_rank_0.pt", weights_only=False)
        for folder in (save, one_rank[0] / "ckpt" / "actor")
    )
    assert state.keys() == expected.keys()


def test_an_actor_that_cannot_share_says_why_and_trains_on_a_copy_of_its_own(
    run_engine, one_rank, nvfp4_checkpoint, tmp_path
):
    environment = sharing_job(required=False, kernel="hopper").environment()
    report = run_engine(nvfp4_checkpoint, tmp_path / "r", environment=environment, steps=1)[0]
    assert report["steps"] == one_rank[1]["steps"][:1] and report["parameters"] == one_rank[1]["parameters"]
    said = "base: a copy each: qerl.rollout.kernel=hopper cannot run on cpu"
    assert said in (tmp_path / "r.0.log").read_text()
    required = sharing_job(kernel="hopper").environment()
    with pytest.raises(AssertionError, match="SharingError: qerl.base=shared: qerl.rollout.kernel=hopper cannot run"):
        run_engine(nvfp4_checkpoint, tmp_path / "r", environment=required, steps=1)


def test_resuming_continues_bit_for_bit(run_engine, one_rank, nvfp4_checkpoint, tmp_path):
    folder, unbroken = one_rank
    resumed = run_engine(
        nvfp4_checkpoint, tmp_path / "r", steps=4, first_step=2, randomize=False, load=str(folder / "ckpt" / "actor")
    )[0]
    assert resumed["loaded"] == unbroken["saved"] != unbroken["adapter"]
    assert resumed["steps"] == unbroken["steps"][2:]
    assert resumed["adapter"] == unbroken["adapter"] and resumed["optimizer_steps"] == [4]


def test_an_adapter_of_another_rank_is_refused(run_engine, one_rank, nvfp4_checkpoint, tmp_path):
    with pytest.raises(AssertionError, match="size mismatch|shape"):
        run_engine(nvfp4_checkpoint, tmp_path / "r", steps=1, lora_rank=4, load=str(one_rank[0] / "ckpt" / "actor"))


def test_training_goes_on_from_an_adapter_folder(run_engine, one_rank, nvfp4_checkpoint, tmp_path, without_prefix):
    adapter = without_prefix(one_rank[0] / "ckpt" / "actor" / "lora_adapter", tmp_path / "adapter")
    report = run_engine(nvfp4_checkpoint, tmp_path / "r", lora_adapter_path=str(adapter))[0]
    assert report["built"] == one_rank[1]["saved"]
    assert {p["dtype"] for p in report["parameters"].values() if p["trains"]} == {"torch.float32"}


@pytest.mark.parametrize("shared", [False, True])
def test_two_ranks_shard_the_bytes_and_train_the_same_adapter(run_engine, one_rank, nvfp4_checkpoint, tmp_path, shared):
    """With a base that the rollout also uses, each rank has all of it in place, and only adapters
    are sharded.
    """
    sharing = sharing_job().environment() if shared else {}
    reports = run_engine(nvfp4_checkpoint, tmp_path / "r", world=2, environment=sharing, steps=4)
    sharded = [n for n, p in reports[0]["parameters"].items() if p["local_bytes"] * 2 == p["bytes"]]
    assert sum(name.endswith(".weight_joined") for name in sharded) == (0 if shared else 2 * 7)
    assert sum("lora_" in name for name in sharded) == 2 * 7 * 2
    assert reports[0]["adapter"] == reports[1]["adapter"]
    for found, expected in zip(reports[0]["steps"], one_rank[1]["steps"], strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=ROUNDING)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=4 * ROUNDING)
    ours, theirs = torch.load(f"{tmp_path}/r.adapter.pt"), torch.load(one_rank[0] / "r.adapter.pt")
    difference = sum((ours[n] - theirs[n]).square().sum() for n in ours) ** 0.5
    moved = sum(t.square().sum() for t in theirs.values()) ** 0.5
    assert difference / moved < 4 * ROUNDING


def test_building_never_holds_the_model_in_16_bits(run_engine, model_factory, tmp_path):
    from qerl_verl.nvfp4.quantize import quantize_checkpoint

    shape = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=8)
    source = model_factory(tmp_path / "source", **shape)
    quantize_checkpoint(source, tmp_path / "packed", progress=False)
    report = run_engine(tmp_path / "packed", tmp_path / "r")[0]
    frozen = sum(p["bytes"] for p in report["parameters"].values() if not p["trains"])
    in_16_bits = sum(f.stat().st_size for f in source.glob("*.safetensors"))
    assert in_16_bits > 300e6 and frozen < 0.31 * in_16_bits
    # Two copies of the packed model: FSDP2 shards a copy while verl still holds the whole state
    # dict to broadcast it. With the allocator's and the imports' share that differs from run to
    # run, less than one copy in 16 bits.
    assert report["peak_growth"] < in_16_bits, f"{report['peak_growth'] / 1e6:.0f} of {in_16_bits / 1e6:.0f} MB"
    print(
        f"peak growth {report['peak_growth'] / 1e6:.0f} MB, packed {frozen / 1e6:.0f}, 16 bits {in_16_bits / 1e6:.0f}"
    )


def test_verls_way_to_build_fsdp2_is_the_one_that_ours_stands_in_for():
    """Ours sets and calls the same (qerl_verl/engine/nvfp4.py, _build_fsdp_module). Where this
    fails, verl has changed its way.
    """
    source = inspect.getsource(FSDPEngine._build_fsdp_module)
    ours = inspect.getsource(NVFP4EngineMixin._build_fsdp_module)
    attributes = set(re.findall(r"self\.(\w+) = ", source))
    assert attributes == {
        "_autocast_dtype", "scaler", "_is_offload_param", "_is_offload_optimizer", "_uses_fsdp2_cpu_offload_policy",
    }  # fmt: skip
    assert all(f"self.{name} = " in ours for name in attributes)
    settings = set(re.findall(r"self\.engine_config\.(\w+)", source.split('== "fsdp2"')[1]))
    assert settings == {"offload_policy", "forward_only", "reshard_after_forward", "strategy"}
    for function in ("apply_fsdp2(", "fsdp2_load_full_state_dict(", "enable_activation_offloading("):
        assert function in source and function in ours


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("SeedOssForCausalLM", {"attention_dropout": 0.1, "residual_dropout": 0.1}),
        ("Phi3ForCausalLM", {"resid_pdrop": 0.2}),
        ("Qwen3VLForConditionalGeneration", {"attention_dropout": 0.1}),
        ("Qwen2ForCausalLM", {}),
    ],
)
def test_a_policy_has_no_dropout_while_it_trains(name, found):
    """Log-probabilities in training are then those of evaluation, with which the rollout's are
    compared.
    """
    config = make_config(name, **found)
    assert remove_dropout(config) == found and remove_dropout(config) == {}
    model, ids = automatic_class(get_architecture(config)).from_config(config), torch.arange(9)[None]
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("dropout", "adapter", "expected"), [(0.0, None, False), (0.1, None, True), (0.0, "some/adapter", True)]
)
def test_a_second_run_draws_what_the_first_drew_where_it_draws_at_all(dropout, adapter, expected):
    engine = type("Engine", (NVFP4EngineMixin,), {"role": "actor"})()
    engine.model_config = SimpleNamespace(lora_adapter_path=adapter)
    assert engine._draws_random_numbers(Qwen2Config(attention_dropout=dropout)) == expected


def test_an_out_of_memory_error_names_the_setting_that_helps():
    class Stock:
        def forward_backward_batch(self, data, loss_function, forward_only):
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = type("Engine", (AdapterEngineMixin, Stock), {"role": "actor"})()
    for how, forward_only, noted in (("selective", False, True), ("selective", True, False), ("full", False, False)):
        engine._recompute = Recompute(how, torch.device("cpu"))
        with pytest.raises(torch.OutOfMemoryError) as error:
            engine.forward_backward_batch(None, None, forward_only)
        assert any("qerl.recompute=full" in note for note in getattr(error.value, "__notes__", [])) == noted
