"""Tests vLLM's loader of a base that the actor owns, with stand-ins for the actor.

``test_live_engine.py`` tests a whole engine.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader

from qerl_verl.config.base import LOAD_FORMAT
from qerl_verl.rollout import shared_base
from qerl_verl.rollout.shared_base import SharedBaseLoader, SharedEmbedding, shared_embedding, shared_weights
from qerl_verl.sharing.channel import BaseOwner, SharedBase
from qerl_verl.sharing.errors import SharingError
from qerl_verl.sharing.layout import LayoutBuilder
from tests.helpers.jobs import sharing_job

CPU = torch.device("cpu")
QKV = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]


@pytest.fixture
def loading(monkeypatch):
    """Provides a model under construction on a base with one fused layer, one that is not, and an
    embedding."""
    builder = LayoutBuilder()
    builder.add_group(QKV, [64, 32, 32], 64, "pytorch")
    builder.add_group(["model.layers.0.self_attn.o_proj"], [64], 64, "pytorch")
    builder.add_tensor("model.embed_tokens.weight", torch.empty(100, 64, dtype=torch.bfloat16), True, 64)
    builder.add_tensor("model.norm.weight", torch.empty(64, dtype=torch.bfloat16), False)
    layout = builder.build()
    base = SharedBase(layout, torch.arange(layout.size).to(torch.uint8), None)
    with shared_base._building(base) as loading:
        yield loading


def test_a_fused_layer_finds_the_rows_of_its_projections(loading):
    packed, scale, global_scales, whole = shared_weights("model.layers.0.self_attn.qkv_proj", [64, 32, 32], "pytorch")
    assert whole
    group = loading.base.layout.groups[0]
    assert packed.shape == (128, 32) and scale.shape == (128, 4) and global_scales.dtype == torch.float32
    assert packed.data_ptr() == loading.base.data.data_ptr() + group.packed
    assert shared_weights("model.layers.0.self_attn.o_proj", [64], "pytorch")[0].shape == (64, 32)
    assert loading.taken == {*QKV, "model.layers.0.self_attn.o_proj"}
    SharedBaseLoader._check(loading)


@pytest.mark.parametrize(
    ("layer", "widths", "backend", "message"),
    [
        ("model.layers.1.self_attn.qkv_proj", [64, 32, 32], "pytorch", "no layer model.layers.1.self_attn.qkv_proj"),
        ("model.layers.0.self_attn.q_proj", [64], "pytorch", "no layer model.layers.0.self_attn.q_proj"),
        ("model.layers.0.self_attn.qkv_proj", [64, 64], "pytorch", r"\[64, 64\] rows for pytorch in the rollout"),
        (
            "model.layers.0.self_attn.o_proj",
            [64],
            "marlin",
            "for marlin in the rollout, of .* for pytorch in the actor",
        ),
    ],
)
def test_a_layer_that_the_actor_does_not_have_so_is_refused(loading, layer, widths, backend, message):
    with pytest.raises(SharingError, match=message):
        shared_weights(layer, widths, backend)


def test_a_layer_of_the_actor_that_the_rollout_lacks_is_refused(loading):
    shared_weights("model.layers.0.self_attn.o_proj", [64], "pytorch")
    with pytest.raises(
        SharingError, match="3 NVFP4 layers of the actor have no place .* model.layers.0.self_attn.q_proj"
    ):
        SharedBaseLoader._check(loading)


@pytest.mark.parametrize(
    ("rows", "dtype", "in_place"),
    [
        (128, torch.bfloat16, True),
        (128, torch.float32, False),
        (192, torch.bfloat16, False),
        (64, torch.bfloat16, False),
    ],
)
def test_an_embedding_is_used_in_place_where_dtype_and_padding_fit(loading, rows, dtype, in_place):
    name = "model.embed_tokens.weight"
    method, layer = SharedEmbedding(name, loading.base.layout.tensors[name], loading), nn.Module()
    method.create_weights(layer, 64, [rows], 64, rows, dtype, weight_loader=None)
    assert layer.weight.shape == (rows, 64) and layer.weight.dtype == dtype
    begin = loading.base.data.data_ptr()
    assert (begin <= layer.weight.data_ptr() < begin + loading.base.data.numel()) is in_place
    own = dict(SharedBaseLoader._own_tensors(loading))
    assert set(own) == {"model.norm.weight"} | (set() if in_place else {name})


def test_without_a_shared_base_layers_have_weights_of_their_own():
    assert shared_weights("model.layers.0.mlp.down_proj", [64], "pytorch") is None
    assert shared_embedding(nn.Module()) is None
    assert isinstance(SharedEmbedding("a", None, None), UnquantizedEmbeddingMethod)


class Plain:
    """Stands for vLLM's own loader."""

    def load_model(self, *arguments):
        return "a model with a base of its own"


@pytest.fixture
def loader():
    shared_base.register_shared_base()
    made = get_model_loader(LoadConfig(load_format=LOAD_FORMAT))
    assert type(made) is SharedBaseLoader and type(made._plain) is DefaultModelLoader
    assert made._plain.load_config.load_format == "safetensors" and made.load_config.load_format == LOAD_FORMAT
    made._plain = Plain()
    return made


def configs(same: bool = True):
    model = object()
    vllm = SimpleNamespace(model_config=model, device_config=SimpleNamespace(device="cpu"))
    return vllm, model if same else object()


def test_an_actor_that_shares_nothing_means_a_second_copy_with_a_line(loader, monkeypatch, capfd):
    job = sharing_job(required=False)
    owner = BaseOwner("the rollout computes with marlin", job.sharing.key, 2)
    for name, value in {**job.environment(), "VERL_REPLICA_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert loader.load_model(*configs()) == "a model with a base of its own"
    owner.close()
    assert "[qerl] base: the rollout loads a second copy: the rollout computes with marlin" in capfd.readouterr().out


def test_an_insisted_on_base_that_cannot_be_had_ends_the_engine(loader, monkeypatch):
    job = sharing_job()
    for name, value in {**job.environment(), "VERL_REPLICA_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(shared_base.SharedBase.connect.__func__, "__defaults__", (0.1,))
    with pytest.raises(SharingError, match="qerl.base=shared: no process on this host owns the base of rank 0"):
        loader.load_model(*configs())


@pytest.mark.parametrize("draft", [True, False])
def test_a_draft_model_and_a_job_that_does_not_share_load_as_always(loader, monkeypatch, draft):
    if draft:
        for name, value in sharing_job().environment().items():
            monkeypatch.setenv(name, value)
    assert loader.load_model(*configs(same=not draft)) == "a model with a base of its own"
