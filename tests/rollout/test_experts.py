"""Tests NVFP4 experts one layer of vLLM at a time, against the decoded weights in float64."""

import copy

import pytest
import torch
from peft import LoraConfig
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import PackedLoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as vllms,
)
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.utils import get_moe_expert_mapping

from qerl_verl.kernels import triton as triton_kernels
from qerl_verl.kernels.nvfp4_experts import ExpertStack, nvfp4_experts_reference, route_softmax
from qerl_verl.lora.experts import stack_experts
from qerl_verl.lora.peft import save_adapter
from qerl_verl.nvfp4.candidates import PyTorchExperts, TritonExperts, VLLMExperts, VLLMKernel, expert_candidates
from qerl_verl.nvfp4.format import QUANTIZATION_CONFIG
from qerl_verl.rollout.experts import QeRLExpertsMethod, VLLMExpertsMethod
from qerl_verl.rollout.lora import AdapterStore
from qerl_verl.rollout.quantization import QeRLCompressedTensorsConfig
from qerl_verl.rollout.scheme import SETTING
from tests.helpers.tiny_experts import LINEARS, TinyExperts, make_adapter, make_tokens

EXPERTS, HIDDEN, INNER, TOP_K, TOKENS = 6, 64, 64, 2, 11
NAME = "model.layers.0.mlp.experts"
LORA = {"rank": 8, "alpha": 16}


def parallel(rank=0, ranks=1, by_expert=False):
    """Returns vLLM's description of how experts are divided, for a layer of its own."""
    tp, ep = ((0, 1), (rank, ranks)) if by_expert else ((rank, ranks), (0, 1))
    return FusedMoEParallelConfig(
        tp_size=tp[1], tp_rank=tp[0], ep_size=ep[1], ep_rank=ep[0], use_ep=by_expert, pcp_size=1, pcp_rank=0,
        dp_size=1, dp_rank=0, sp_size=1, all2all_backend="allgather_reducescatter", enable_eplb=False,
    )  # fmt: skip


def build(
    divided=None, activations=None, settings=(), inner=INNER, moe=(), ignore=(), dtype=torch.float32, **attributes
):
    """Builds an empty layer as vLLM's model does.

    Args:
        divided: see :func:`parallel`.
        activations: ``input_activations`` of the checkpoint's configuration.
        settings: settings of the engine.
        moe: changes to vLLM's configuration of the layer.
        ignore: names that the checkpoint leaves in 16 bits.
        dtype: dtype of the activations.
        attributes: further arguments of vLLM's layer.
    """
    divided = divided or parallel()
    written = copy.deepcopy(QUANTIZATION_CONFIG)
    group = written["config_groups"]["group_0"]
    group["input_activations"] = activations and {**group["weights"], "dynamic": "local"}
    written["ignore"] = [*written["ignore"], *ignore]
    config = VllmConfig(additional_config={"qerl": {"kernel": "auto", "lora": LORA, **dict(settings)}})
    with set_current_vllm_config(config):
        manager = ExpertMapManager(
            max_num_batched_tokens=64, top_k=TOP_K, global_num_experts=EXPERTS, num_redundant_experts=0,
            num_expert_group=None, moe_parallel_config=divided, placement_strategy="linear", enable_eplb=False,
        )  # fmt: skip
        arguments = dict(
            num_experts=EXPERTS, experts_per_token=TOP_K, hidden_dim=HIDDEN, intermediate_size=inner,
            num_local_experts=manager.local_num_experts, num_logical_experts=EXPERTS, activation=MoEActivation.SILU,
            device="cpu", routing_method=RoutingMethodType.Renormalize, moe_parallel_config=divided,
            in_dtype=dtype,
        )  # fmt: skip
        return RoutedExperts(
            NAME, dtype, FusedMoEConfig(**arguments | dict(moe)),
            QeRLCompressedTensorsConfig.from_config(written), expert_map_manager=manager, **attributes,
        )  # fmt: skip


def tensors_of(experts, activations=None):
    """Returns the tensors of a checkpoint, in another order than vLLM's parameters."""
    tensors = list(experts.tensors.items())
    if activations:
        names = [f"{e}.{linear}.input_global_scale" for e in range(EXPERTS) for linear in LINEARS]
        tensors += [(name, torch.tensor([300.0 + i])) for i, name in enumerate(names)]
    return tensors[::-1]


def load(layer, experts, activations=None):
    loaded = list(layer.load_weights(iter(tensors_of(experts, activations))))
    layer.quant_method.process_weights_after_loading(layer)
    return loaded


def run(layer, x, logits):
    """Returns the layer's output for some tokens, called as vLLM's runner does."""
    if layer.quant_method.is_monolithic:
        return layer.forward_monolithic(x, logits)
    return layer.forward_modular(x, *route_softmax(logits, TOP_K, True))


def check(outputs, experts, x, logits, relative=3e-6):
    """Checks the sum of all ranks' outputs."""
    want = experts.compute(x, *route_softmax(logits, TOP_K, True))
    got = torch.stack(outputs).double().sum(0)
    torch.testing.assert_close(got, want, rtol=0, atol=relative * want.abs().max().item())


@pytest.mark.parametrize("activations", [None, "as the weights"])
@pytest.mark.parametrize("shared_scale", [True, False])
def test_a_layer_computes_what_its_checkpoint_says(shared_scale, activations):
    """A W4A4 checkpoint is served too, without its activation scales. The weights stay packed."""
    experts, layer = TinyExperts(EXPERTS, HIDDEN, INNER, shared_scale), build(activations=activations)
    assert len(load(layer, experts, activations)) == len(tensors_of(experts, activations))
    x, logits = make_tokens(torch.float32, TOKENS, HIDDEN, EXPERTS)
    check([run(layer, x, logits)], experts, x, logits)
    assert not [name for name, _ in layer.named_parameters() if "input" in name]
    assert {p.element_size() for name, p in layer.named_parameters() if p.dim() == 3} == {1}


@pytest.mark.parametrize("by_expert", [False, True])
def test_ranks_add_up_to_the_layer(by_expert):
    """Tensor parallelism divides the intermediate channels, expert parallelism the experts."""
    experts, outputs = TinyExperts(EXPERTS, HIDDEN, INNER, shared_scale=False), []
    x, logits = make_tokens(torch.float32, TOKENS, HIDDEN, EXPERTS)
    for rank in range(2):
        layer = build(parallel(rank, 2, by_expert))
        load(layer, experts)
        count, inner = (EXPERTS // 2, INNER) if by_expert else (EXPERTS, INNER // 2)
        assert layer.w13_weight_packed.shape == (count, 2 * inner, HIDDEN // 2)
        assert layer.w2_weight_packed.shape == (count, HIDDEN, inner // 2)
        outputs.append(run(layer, x, logits))
    check(outputs, experts, x, logits)
    assert outputs[0].abs().max() > 0 < outputs[1].abs().max()


class MarlinOnTheCPU:
    """Replaces vLLM's kernel with its interface. It reads the tensors of its configuration in its
    own order, and has one factor for gate and up.
    """

    consumes_expert_mask = is_monolithic = False

    def __init__(self, moe_quant_config, **kwargs):
        self.config, self.fused_experts = moe_quant_config, self

    def process_weights_after_loading(self, layer):
        pass

    def apply(self, x, w13, w2, topk_weights, topk_ids, *, expert_map, **kwargs):
        c = self.config
        gate_up = ExpertStack(w13.flip(-1), c["w13_scale"].flip(-1), c["w13_scale_2"])
        down = ExpertStack(w2.flip(-1), c["w2_scale"].flip(-1), c["w2_scale_2"])
        chosen = topk_ids if expert_map is None else expert_map[topk_ids]
        return nvfp4_experts_reference(x, topk_weights, chosen, gate_up, down)


def use_marlin(monkeypatch, version):
    """Returns vLLM's method with its kernel calls replaced. In 0.24 the factors are plain
    attributes.
    """

    def convert(w13, w13_scale, w13_scale_2, w2, w2_scale, w2_scale_2, **kwargs):
        w13_scale, w2_scale = (scale.data.view(torch.uint8).flip(-1) for scale in (w13_scale, w2_scale))
        return w13.flip(-1), w13_scale, w13_scale_2, None, w2.flip(-1), w2_scale, w2_scale_2, None

    real = vllms.replace_parameter

    def replace(layer, name, value):
        if name.endswith("scale_2") and version == "0.24":
            setattr(layer, name, value)
        else:
            real(layer, name, value)

    monkeypatch.setattr(VLLMKernel, "unsupported_device", lambda self, device: None)
    monkeypatch.setattr(VLLMKernel, "unsupported_weight", lambda self, n, k, dtype: None)
    monkeypatch.setattr(vllms, "select_nvfp4_moe_backend", lambda **kwargs: ("MARLIN", MarlinOnTheCPU))
    monkeypatch.setattr(vllms, "is_global_sf_supported_for_nvfp4_backend", lambda backend: False)
    monkeypatch.setattr(vllms, "convert_to_nvfp4_moe_kernel_format", convert)
    monkeypatch.setattr(vllms, "make_nvfp4_moe_quant_config", lambda **kwargs: kwargs)
    monkeypatch.setattr(vllms, "make_nvfp4_moe_kernel", MarlinOnTheCPU)
    monkeypatch.setattr(vllms, "replace_parameter", replace)
    monkeypatch.setattr(VLLMExpertsMethod, "is_monolithic", False)


VERSIONS = ("0.24", "0.28")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("activations", [None, "as the weights"])
@pytest.mark.parametrize("shared_scale", [True, False])
def test_vllms_kernel_gets_what_the_checkpoint_says(monkeypatch, capsys, shared_scale, activations, version):
    """The kernel has one factor for gate and up, which may have separate global scales."""
    use_marlin(monkeypatch, version)
    experts, layer = TinyExperts(EXPERTS, HIDDEN, INNER, shared_scale), build(activations=activations)
    load(layer, experts, activations)
    assert type(layer.quant_method) is VLLMExpertsMethod
    x, logits = make_tokens(torch.float32, TOKENS, HIDDEN, EXPERTS)
    check([run(layer, x, logits)], experts, x, logits)
    assert not [name for name, _ in layer.named_parameters() if "input" in name]
    line = "vLLM's MarlinOnTheCPU on cpu (not hopper: it has no kernel for experts): 1 layer (experts 1)"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("marlin", [None, *VERSIONS])
@pytest.mark.parametrize("activations", [None, "as the weights"])
def test_the_base_is_read_again_into_the_memory_that_it_had(monkeypatch, marlin, activations):
    """A sleep at level 2 loses the content of all parameters, and CUDA graphs read them at their
    addresses.
    """
    if marlin:
        use_marlin(monkeypatch, marlin)
    experts, layer = TinyExperts(EXPERTS, HIDDEN, INNER, shared_scale=False), build(activations=activations)
    assert isinstance(layer.quant_method, VLLMExpertsMethod if marlin else QeRLExpertsMethod)
    reload.record_metadata_for_reloading(layer)
    load(layer, experts, activations)
    x, logits = make_tokens(torch.float32, TOKENS, HIDDEN, EXPERTS)
    before = {name: (p.data_ptr(), p.clone()) for name, p in layer.named_parameters()}
    kernel, first = layer.quant_method.moe_kernel, run(layer, x, logits)
    read = [t for t in kernel.config.values() if isinstance(t, torch.Tensor)] if marlin else []
    for tensor in (*layer.parameters(), *read):
        tensor.data.zero_()

    reload.initialize_layerwise_reload(layer)
    list(layer.load_weights(iter(tensors_of(experts, activations))))
    done = not get_layerwise_info(layer).can_load()  # not held back to the end of all layers
    reload.finalize_layerwise_reload(layer, None)
    assert done
    assert dict(layer.named_parameters()).keys() == before.keys()
    for name, parameter in layer.named_parameters():
        place, value = before[name]
        assert parameter.data_ptr() == place and torch.equal(parameter.float(), value.float()), name
    assert layer.quant_method.moe_kernel is kernel
    assert torch.equal(run(layer, x, logits), first)


def test_tritons_kernel_is_compiled_when_the_layer_is_loaded(monkeypatch, capsys):
    """The reference stands in for the kernel."""
    warmed = []
    monkeypatch.setattr(TritonExperts, "unsupported_device", lambda self, device: None)
    monkeypatch.setattr(triton_kernels, "experts", nvfp4_experts_reference)
    monkeypatch.setattr(triton_kernels, "warm_up_experts", lambda *arguments: warmed.append(arguments))
    experts, layer = TinyExperts(EXPERTS, HIDDEN, INNER), build(settings={"kernel": "triton"}, dtype=torch.bfloat16)
    load(layer, experts)
    ((gate_up, down, top_k, dtype, adapter),) = warmed
    assert adapter is None
    assert (gate_up.packed.shape[0], top_k, dtype) == (EXPERTS, TOP_K, torch.bfloat16)
    assert down.factors.data_ptr() == layer.qerl_w2_factors.data_ptr()
    x, logits = make_tokens(torch.bfloat16, TOKENS, HIDDEN, EXPERTS)
    check([run(layer, x, logits)], experts, x, logits, relative=3e-2)
    assert f"Triton W4A16, grouped by expert on cpu ({SETTING}): 1 layer (experts 1)" in capsys.readouterr().out


def test_experts_that_the_checkpoint_leaves_in_16_bits_are_vllms():
    layer = build(ignore=["re:.*mlp.experts.*"])
    assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"


def test_the_line_says_that_the_experts_have_no_adapter(capsys):
    load(build(), TinyExperts(EXPERTS, HIDDEN, INNER))
    found = capsys.readouterr().out
    assert "(not hopper: it has no kernel for experts; not marlin: it runs on CUDA, not on cpu; " in found
    assert ": 1 layer (experts 1); adapter of rank 8 in the layer, none in the experts" in found


REFUSED = [
    # what is asked for, and the message
    (dict(settings={"kernel": "hopper"}), rf"{SETTING}=hopper does not serve {NAME} of 128 x 64: it has no kernel for experts; use auto"),
    (dict(settings={"kernel": "marlin"}), rf"{SETTING}=marlin cannot run on cpu: it runs on CUDA, not on cpu; use auto"),
    (dict(settings={"kernel": "cutlass"}), rf"{SETTING}=cutlass: choose one of auto, hopper, marlin, triton, pytorch"),
    (
        dict(inner=48, divided=parallel(0, 2)),
        rf"{NAME}: 24 intermediate channels per tensor-parallel rank are not .* another actor_rollout_ref.rollout.tensor_model_par",
    ),
    (dict(moe={"is_lora_enabled": True}), rf"{NAME}: qerl.rollout.lora=punica does not serve experts in NVFP4; use .*inline"),
    (dict(moe={"activation": MoEActivation.GELU}), rf"{NAME}: the activation is gelu, which the pytorch kernel for experts does not"),
    (dict(moe={"has_bias": True}), rf"{NAME}: the experts have biases, which the pytorch kernel"),
    (dict(scoring_func="sigmoid"), rf"{NAME}: scoring_func is sigmoid, which the pytorch kernel"),
    (dict(e_score_correction_bias=torch.zeros(EXPERTS)), rf"{NAME}: e_score_correction_bias is tensor"),
]  # fmt: skip


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_what_is_not_served_is_refused_by_name(asked, message):
    with pytest.raises(ValueError, match=message):
        build(**asked)


def test_plain_pytorch_is_refused_where_cuda_graphs_are_captured():
    cuda = torch.device("cuda")
    assert "rollout.enforce_eager=True" in PyTorchExperts(captured=True).unsupported_device(cuda)
    assert PyTorchExperts(captured=False).unsupported_device(cuda) is None
    assert PyTorchExperts(captured=True).unsupported_device(torch.device("cpu")) is None


def test_marlins_shapes():
    assert VLLMExperts().unsupported_weight(1536, 2048, torch.bfloat16) is None
    assert "multiple of 64, got 2080" in VLLMExperts().unsupported_weight(1536, 2080, torch.bfloat16)
    assert "bfloat16 or float16" in VLLMExperts().unsupported_weight(1536, 2048, torch.float32)


def test_the_setting_names_the_candidates():
    from qerl_verl.config.settings import ROLLOUT_KERNELS

    assert set(ROLLOUT_KERNELS) == {"auto"} | {candidate.name for candidate in expert_candidates(captured=True)}


PREFIX = f"base_model.model.{NAME}"
ADAPTED = {"lora": LORA | {"experts": True}}
SCALING = LORA["alpha"] / LORA["rank"]


def store_of(layer, rank=0, ranks=1):
    """Returns the store of a model whose only layer this is."""
    model = torch.nn.Module()
    model.experts = layer
    return AdapterStore(model, rank, ranks)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("shared_scale", [True, False])
@pytest.mark.parametrize(("rank", "scaling"), [(LORA["rank"], SCALING), (3, 0.5)])
def test_an_adapter_on_the_experts(shared_scale, stacked, rank, scaling, capsys):
    """As a file has it and as the actor sends it, of another rank and scaling than the engine was
    started for, too. An adapter without experts takes it off again."""
    experts, layer = TinyExperts(EXPERTS, HIDDEN, INNER, shared_scale), build(settings=ADAPTED)
    load(layer, experts)
    assert "adapter of rank 8 in the layer, also in the experts" in capsys.readouterr().out
    x, logits = make_tokens(torch.float32, TOKENS, HIDDEN, EXPERTS)
    store, clean = store_of(layer), run(layer, x, logits)
    check([clean], experts, x, logits)
    tensors = make_adapter(experts, PREFIX, rank)
    sent = stack_experts(tensors) if stacked else tensors
    assert store.load(sent.items(), scaling) == len(sent)
    adapted = run(layer, x, logits)
    check([adapted], experts.adapted(tensors, PREFIX, scaling), x, logits)
    assert (adapted - clean).norm() > 0.1 * clean.norm()
    store.load([], 1.0)
    assert torch.equal(run(layer, x, logits), clean)


@pytest.mark.parametrize("by_expert", [False, True])
def test_the_adapters_of_ranks_add_up(by_expert):
    experts, outputs = TinyExperts(EXPERTS, HIDDEN, INNER, shared_scale=False), []
    x, logits = make_tokens(torch.float32, TOKENS, HIDDEN, EXPERTS)
    tensors = make_adapter(experts, PREFIX, LORA["rank"])
    for rank in range(2):
        layer = build(parallel(rank, 2, by_expert), settings=ADAPTED)
        load(layer, experts)
        store_of(layer, rank, 2).load(tensors.items(), SCALING)
        outputs.append(run(layer, x, logits))
    check(outputs, experts.adapted(tensors, PREFIX, SCALING), x, logits)


def test_marlin_takes_no_adapter_on_the_experts(monkeypatch):
    use_marlin(monkeypatch, "0.28")
    with pytest.raises(
        ValueError, match="qerl.rollout.kernel=marlin cannot run .*: it takes no adapter on the experts"
    ):
        build(settings=ADAPTED | {"kernel": "marlin"})
    monkeypatch.setattr(TritonExperts, "unsupported_device", lambda self, device: None)
    layer = build(settings={"lora": {"rank": 20, "alpha": 8, "experts": True}}, dtype=torch.bfloat16)
    assert isinstance(layer.quant_method.experts.choice.backend, TritonExperts)
    assert layer.qerl_lora_down_b.shape == (EXPERTS, HIDDEN, 32) and layer.qerl_lora_scaling == 0.4


MISFITS = [
    # layer of the adapter's tensors, what is changed, room in the engine, and the message
    ("experts", {"drop": ".5.up_proj.lora_B"}, True, "5.up_proj.lora_B is missing, or has another shape than the first"),
    ("experts", {"drop": "lora_B"}, True, f"the adapter of {NAME} does not fit the rollout model: it has no down_proj B, gate_up_proj B"),
    ("experts", {"rank": 9}, True, "room for rank 8: set actor_rollout_ref.model.lora_rank"),
    ("experts", {"experts": 5}, True, "the rollout has 6 experts"),
    ("experts", {}, False, "experts have no room: .* name gate_proj, up_proj and down_proj in actor_rollout_ref.model.target_modules"),
    ("gate", {"names": ["gate.lora_A.weight"]}, True, "no adapter on the router of a mixture; take it out"),
    ("experts", {"names": ["experts.lora_A.weight"]}, True, "by the names of their linears, not by those of 3-D parameters"),
    ("experts", {"names": ["experts.base_layer.lora_A.weight"]}, True, "not by those of 3-D parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "change", "room", "message"), MISFITS)
def test_what_does_not_fit_is_refused_by_name(module, change, room, message):
    """Nothing has been written then."""
    layer = build(settings=ADAPTED if room else ())
    load(layer, TinyExperts(EXPERTS, HIDDEN, INNER))
    experts = TinyExperts(change.get("experts", EXPERTS), HIDDEN, INNER)
    tensors = make_adapter(experts, PREFIX, change.get("rank", 8))
    tensors = {name: t for name, t in tensors.items() if change.get("drop", "!") not in name}
    if names := change.get("names"):
        tensors = {f"{PREFIX.removesuffix('experts')}{name}": torch.zeros(8, HIDDEN) for name in names}
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(ValueError, match=message):
        store_of(layer).load(tensors.items(), SCALING)
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_vllms_own_lora_path_reads_the_file(tmp_path):
    """vLLM 0.28 gives experts an adapter on a GPU alone, since its layer takes no monolithic
    kernel, as the CPU's is (vllm/lora/layers/fused_moe.py, FusedMoEWithLoRA). Its parser and
    packing take a file."""
    experts = TinyExperts(EXPERTS, HIDDEN, INNER)
    tensors, linears = make_adapter(experts, PREFIX, LORA["rank"]), list(LINEARS)
    config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules=linears)
    save_adapter(tmp_path, tensors, config, "")
    mapping = get_moe_expert_mapping(build())
    # vllm/lora/utils.py, process_packed_modules_mapping
    names = [name.rstrip(".") for _, name, _, _ in mapping]
    helper = PEFTHelper.from_local_dir(str(tmp_path), None)
    lora = LoRAModel.from_local_checkpoint(
        str(tmp_path), {*names, "experts"}, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    packed = PackedLoRALayerWeights.pack_moe([lora.get_lora(f"model.layers.0.mlp.{name}") for name in names], NAME)
    stacked = stack_experts(tensors)
    pairs = zip(packed.lora_a, packed.lora_b, ("gate_proj", "down_proj", "up_proj"), strict=True)
    for a, b, linear in pairs:
        for expert in range(EXPERTS):
            assert torch.equal(a[expert], tensors[f"{PREFIX}.{expert}.{linear}.lora_A.weight"])
            assert torch.equal(b[expert], tensors[f"{PREFIX}.{expert}.{linear}.lora_B.weight"])
    assert packed.scaling == [SCALING] * 3
    assert torch.equal(stacked[f"{PREFIX}.lora_A.gate_up_proj"], torch.cat((packed.lora_a[0], packed.lora_a[2]), 1))
