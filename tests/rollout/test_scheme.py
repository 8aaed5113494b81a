"""Tests the NVFP4 linears of vLLM one layer at a time, loaded as vLLM does, against the decoded
weight.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from vllm.model_executor import parameter
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW4A4Fp4

from qerl_verl.kernels.backends import HopperBackend, get_backend
from qerl_verl.kernels.nvfp4_dequantize import block_values_nvfp4, dequantize_nvfp4
from qerl_verl.kernels.nvfp4_lora_linear import add_lora_reference
from qerl_verl.kernels.nvfp4_quantize import quantize_nvfp4
from qerl_verl.kernels.packed_weight import PackedWeight
from qerl_verl.rollout.lora import AdapterStore, LoraSettings
from qerl_verl.rollout.scheme import (
    CANDIDATES,
    AdapterOnLinear,
    KernelReport,
    NVFP4Scheme,
    QeRLNVFP4Scheme,
    VLLMKernel,
    VLLMScheme,
)
from qerl_verl.rollout.shared_base import SharedWeights

K, WIDTHS, RANK = 128, [256, 128, 128], 8
LORA = LoraSettings(rank=RANK, alpha=16)
CPU, PYTORCH = torch.device("cpu"), get_backend("pytorch")
ONE_BY_ONE = (9000.0, 5000.0, 12345.0)
"""Global scales of projections that were quantized each by itself, as llm-compressor may do."""


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def load(scheme, global_scales=(9000.0, 9000.0, 9000.0), dtype=torch.float32, bias=None):
    """Loads a fused q, k, v layer of a W4A4 checkpoint as vLLM does; returns it and its float32
    weight.
    """
    torch.manual_seed(0)
    layer, parts = nn.Module(), []
    layer.prefix, layer.params_dtype = "model.layers.0.self_attn.qkv_proj", dtype
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    scheme.create_weights(
        layer=layer,
        output_partition_sizes=WIDTHS,
        input_size_per_partition=K,
        params_dtype=dtype,
        weight_loader=lambda *args: None,
    )
    begin = 0
    for i, (width, value) in enumerate(zip(WIDTHS, global_scales, strict=True)):
        packed, scale = quantize_nvfp4(torch.randn(width, K) * 0.05, torch.tensor([value]))
        layer.weight_packed.data[begin : begin + width] = packed
        layer.weight_scale.data[begin : begin + width] = scale
        layer.weight_global_scale.data[i] = value
        layer.input_global_scale.data[i] = 300.0 + i
        parts.append(dequantize_nvfp4(packed, scale, torch.tensor([value]), torch.float32))
        begin += width
    scheme.process_weights_after_loading(layer)
    return layer, torch.cat(parts)


def adapt(layer):
    """Loads an adapter into the layer and returns the LoRA delta of the weight."""
    model = nn.ModuleDict({"self_attn": nn.ModuleDict({"qkv_proj": layer})})
    tensors, delta = {}, []
    for name, width in zip("qkv", WIDTHS, strict=True):
        a, b = torch.randn(RANK, K), torch.randn(width, RANK)
        tensors |= {f"self_attn.{name}_proj.lora_A.weight": a, f"self_attn.{name}_proj.lora_B.weight": b}
        delta.append(LORA.scaling * b @ a)
    AdapterStore(model, 0, 1).load(tensors.items(), LORA.scaling)
    return torch.cat(delta)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("global_scales", [(9000.0, 9000.0, 9000.0), ONE_BY_ONE])
def test_a_layer_is_the_dequantized_weight_and_its_adapter(global_scales, lora, bias):
    scheme = QeRLNVFP4Scheme(PYTORCH, lora)
    layer, weight = load(scheme, global_scales)
    b, x = torch.randn(sum(WIDTHS)) if bias else None, torch.randn(5, K)
    if lora:
        torch.testing.assert_close(scheme.apply_weights(layer, x, b), nn.functional.linear(x, weight, b))
        weight = weight + adapt(layer)
    torch.testing.assert_close(
        scheme.apply_weights(layer, x, b), nn.functional.linear(x, weight, b), rtol=1e-4, atol=1e-4
    )
    assert {n for n, _ in layer.named_parameters()} == {"weight_packed", "weight_scale", "weight_global_scale"}


class InHoppersLayout(HopperBackend):
    """Computes weights and adapters in Hopper's layout in PyTorch."""

    def linear(self, x, weight, bias=None):
        packed, scale = self.unpack(weight.packed, weight.scale)
        return PYTORCH.linear(x, PackedWeight(packed, scale, weight.global_scale), bias)

    def lora_linear(self, x, weight, bias, lora_a, lora_b, ends, scaling):
        b = self.unpack_lora_b(lora_b)
        return add_lora_reference(self.linear(x, weight, bias), x, lora_a, b, ends, scaling)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=32, alpha=64)])  # two steps of 16, which groups interleave
def test_projections_of_a_shared_weight_that_are_laid_out_by_themselves(lora, bias):
    """The widths do not fill Hopper's groups of 256 rows, so the fused weight is not their
    stack."""
    own = QeRLNVFP4Scheme(PYTORCH, lora)
    layer, weight = load(own, ONE_BY_ONE)
    backend = InHoppersLayout()
    parts = zip(layer.weight_packed.split(WIDTHS), layer.weight_scale.split(WIDTHS), strict=True)
    laid_out = [backend.prepack(packed.contiguous(), scale.contiguous()) for packed, scale in parts]
    stack = [torch.cat(tensors) for tensors in zip(*laid_out, strict=True)]
    assert not torch.equal(stack[0], backend.prepack(layer.weight_packed.data, layer.weight_scale.data)[0])
    scheme = QeRLNVFP4Scheme(backend, lora, SharedWeights(*stack, torch.tensor(ONE_BY_ONE), whole=False))
    shared = nn.Module()
    sizes = dict(output_partition_sizes=WIDTHS, input_size_per_partition=K, params_dtype=torch.float32)
    scheme.create_weights(layer=shared, weight_loader=None, **sizes)
    assert shared.weight_packed.data_ptr() == stack[0].data_ptr()
    scheme.process_weights_after_loading(shared)
    b, x = torch.randn(sum(WIDTHS)) if bias else None, torch.randn(5, K)
    if lora:
        weight = weight + adapt(shared)
    expected = nn.functional.linear(x, weight, b)
    torch.testing.assert_close(scheme.apply_weights(shared, x, b), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 300])
def test_projections_laid_out_by_themselves_on_hopper(tokens):
    """Gate and up of 320 rows each, as the 115.5 groups of the 72B model's."""
    backend, device = HopperBackend(), torch.device("cuda", 0)
    if reason := backend.unsupported_device(device):
        pytest.skip(reason)
    torch.manual_seed(0)
    widths, columns, rank, scales = [320, 320], 256, 32, (9000.0, 5000.0)
    parts = [quantize_nvfp4(torch.randn(n, columns) * 0.05, torch.tensor([s])) for n, s in zip(widths, scales)]
    weight = torch.cat([dequantize_nvfp4(*p, torch.tensor([s]), torch.float32) for p, s in zip(parts, scales)])
    laid_out = [backend.prepack(packed.to(device), scale.view(torch.uint8).to(device)) for packed, scale in parts]
    stack = [torch.cat(tensors) for tensors in zip(*laid_out, strict=True)]
    shared = SharedWeights(*stack, torch.tensor(scales, device=device), whole=False)
    scheme, layer = QeRLNVFP4Scheme(backend, LoraSettings(rank, rank), shared), nn.Module()
    sizes = dict(output_partition_sizes=widths, input_size_per_partition=columns, params_dtype=torch.bfloat16)
    scheme.create_weights(layer=layer, weight_loader=None, **sizes)
    scheme.process_weights_after_loading(layer)
    a, b = [torch.randn(rank, columns) / 16 for _ in widths], [torch.randn(n, rank) / 8 for n in widths]
    tensors = {(i, kind): t for kind, pair in (("A", a), ("B", b)) for i, t in enumerate(pair)}
    layer.qerl_adapter.write(layer, tensors, 1.0, lambda tensor, dim, size: tensor)
    weight += torch.cat([y @ x for x, y in zip(a, b, strict=True)])
    x = torch.randn(tokens, columns)
    found = scheme.apply_weights(layer, x.to(device, torch.bfloat16)).float().cpu()
    expected = nn.functional.linear(x.bfloat16().float(), weight)
    assert (found - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_in_16_bits_takes_the_adapter_too(bias):
    method, layer = AdapterOnLinear(LORA), nn.Module()
    method.create_weights(layer, K, WIDTHS, K, sum(WIDTHS), torch.float32, weight_loader=lambda *args: None)
    torch.manual_seed(0)
    weight = torch.randn(sum(WIDTHS), K) * 0.05
    layer.weight.data.copy_(weight)
    method.process_weights_after_loading(layer)
    b, x = torch.randn(sum(WIDTHS)) if bias else None, torch.randn(5, K)
    torch.testing.assert_close(method.apply(layer, x, b), nn.functional.linear(x, weight, b), rtol=1e-4, atol=1e-4)
    weight = weight + adapt(layer)
    torch.testing.assert_close(method.apply(layer, x, b), nn.functional.linear(x, weight, b), rtol=1e-4, atol=1e-4)


class MarlinOnTheCPU:
    """Replaces vLLM's kernel with its interface and its effect on a layer: weight and bias in its
    own order.
    """

    def input_quant_key(self):
        return None

    def process_weights_after_loading(self, layer):
        layer.block_values = block_values_nvfp4(layer.weight.data, layer.weight_scale.data, torch.float32)
        del layer.weight, layer.weight_scale
        if getattr(layer, "bias", None) is not None:
            layer.bias = nn.Parameter(layer.bias.flip(0))

    def apply_weights(self, layer, x, bias=None):
        y = x @ layer.block_values.t() * layer.weight_global_scale
        return y if bias is None else y + bias.flip(0)


def vllms_scheme():
    """Returns vLLM's own scheme for 16-bit activations, without its choice of a kernel, which needs
    a GPU."""
    scheme = object.__new__(CompressedTensorsW4A4Fp4)
    scheme.use_a16, scheme.kernel, scheme.group_size = True, MarlinOnTheCPU(), 16
    return scheme


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("global_scales", [(9000.0, 9000.0, 9000.0), ONE_BY_ONE])
def test_vllms_own_kernel_takes_a_w4a4_checkpoint(global_scales, lora, with_bias):
    """``input_global_scale`` has a parameter only while it is loaded; bias and scales are right."""
    scheme = VLLMScheme(vllms_scheme(), lora)
    bias = torch.randn(sum(WIDTHS)) if with_bias else None
    layer, weight = load(scheme, global_scales, bias=bias)
    x = torch.randn(2, 3, K)
    if lora:
        weight = weight + adapt(layer)
    got = scheme.apply_weights(layer, x, getattr(layer, "bias", None))
    torch.testing.assert_close(got, nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)
    assert not hasattr(layer, "input_global_scale")


def test_an_input_width_off_the_block_names_the_setting():
    with pytest.raises(ValueError, match="rollout.tensor_model_parallel_size"):
        QeRLNVFP4Scheme(PYTORCH).create_weights(nn.Module(), [64], 56, torch.bfloat16, None)


def deciding(kernel="auto", lora=LORA, report=None):
    return NVFP4Scheme(CPU, kernel, lora, vllms_scheme, report or KernelReport())


HOPPER, MARLIN = "Hopper W4A16 (WGMMA, CUDA C++) on cpu", "vLLM's MarlinOnTheCPU on cpu"
NO_ADAPTER = "their adapter in PyTorch (the kernel takes no adapter)"
DECIDED = [
    # kernel, dtype, scales, whether the rollout has an adapter of ours: what the line says of one
    # layer
    ("auto", torch.bfloat16, 3 * (9000.0,), LORA, f"{HOPPER}: 1 layer (qkv_proj 1)"),
    ("hopper", torch.bfloat16, 3 * (9000.0,), None, f"{HOPPER} (qerl.rollout.kernel): 1 layer (qkv_proj 1)"),
    (
        "auto", torch.bfloat16, ONE_BY_ONE, LORA,
        f"{HOPPER}: 1 layer (qkv_proj 1), their adapter in PyTorch (its fused projections have a weight_global_scale each)",
    ),
    (
        "auto", torch.float16, 3 * (9000.0,), LORA,
        f"{MARLIN} (not hopper: activations have to be bfloat16, got torch.float16): 1 layer (qkv_proj 1), {NO_ADAPTER}",
    ),
    ("marlin", torch.bfloat16, 3 * (9000.0,), None, f"{MARLIN} (qerl.rollout.kernel): 1 layer (qkv_proj 1)"),
    (
        "auto", torch.float32, 3 * (9000.0,), None,
        "PyTorch (decode, GEMM) on cpu (not hopper: activations have to be bfloat16, got torch.float32; not marlin: "
        "activations have to be bfloat16 or float16, got torch.float32; not triton: it runs on CUDA, not on cpu): "
        "1 layer (qkv_proj 1)",
    ),
]  # fmt: skip


@pytest.fixture
def hopper_and_marlin_run(monkeypatch):
    for candidate in (HopperBackend, VLLMKernel):
        monkeypatch.setattr(candidate, "unsupported_device", lambda self, device: None)


@pytest.mark.parametrize(("kernel", "dtype", "global_scales", "lora", "line"), DECIDED)
def test_the_line_says_what_computes_each_layer(
    hopper_and_marlin_run, capsys, kernel, dtype, global_scales, lora, line
):
    report = KernelReport()
    layer, _ = load(deciding(kernel, lora, report), global_scales, dtype)
    adapter = f"adapter of rank {RANK} in the layer" if lora else "adapter, if any, through vLLM's LoRA path"
    assert capsys.readouterr().out == f"[qerl] kernel: rollout NVFP4 linear = {line}; {adapter}\n"


def test_the_line_comes_once_when_every_layer_is_loaded(capsys):
    report = KernelReport()
    schemes = [deciding("pytorch", None, report) for _ in range(2)]
    layers = [nn.Module() for _ in schemes]
    for scheme, layer in zip(schemes, layers, strict=True):
        scheme.create_weights(layer, [64], 64, torch.bfloat16, weight_loader=None)
        layer.weight_global_scale.data.fill_(1.0)
    for scheme, layer in zip(schemes, layers, strict=True):
        assert capsys.readouterr().out == ""
        scheme.process_weights_after_loading(layer)
    assert ": 2 layers (a layer 2); adapter, if any" in capsys.readouterr().out
    again = nn.Module()  # after a sleep at level 2
    schemes[0].inner.create_weights(again, [64], 64, torch.bfloat16, weight_loader=None)
    schemes[0].process_weights_after_loading(again)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kernel", "dtype", "widths", "global_scale", "message"),
    [
        ("hopper", torch.float16, [128], [1.0], r"does not serve mlp.down_proj of 128 x 128: activations have to be bfloat16"),
        ("hopper", torch.bfloat16, [100], [1.0], r"does not serve mlp.down_proj of 100 x 128: N and K have to be multiples of 64"),
        ("hopper", torch.bfloat16, [64, 64], [1.0, 1.0], r"does not take the adapter of mlp.down_proj of 128 x 128: projections have"),
        ("hopper", torch.bfloat16, [128, 128], [1.0, 2.0], r"does not take the adapter of mlp.down_proj: its fused projections have"),
        ("triton", torch.bfloat16, [128], [1.0], r"cannot run on cpu: it runs on CUDA, not on cpu; use auto or another of hopper, marlin"),
        ("cutlass", torch.bfloat16, [128], [1.0], r"choose one of auto, hopper, marlin, triton, pytorch"),
    ],
)  # fmt: skip
def test_a_kernel_that_is_insisted_on_and_does_not_serve_a_layer_is_refused(
    hopper_and_marlin_run, kernel, dtype, widths, global_scale, message
):
    layer, scheme = nn.Module(), deciding(kernel)
    layer.prefix = "mlp.down_proj"
    with pytest.raises(ValueError, match=f"qerl.rollout.kernel={kernel}:? {message}"):
        scheme.create_weights(layer, widths, K, dtype, weight_loader=None)
        layer.weight_scale.data.zero_()
        layer.weight_global_scale.data.copy_(torch.tensor(global_scale))
        scheme.process_weights_after_loading(layer)


def traced(scheme, layer, dtype):
    """Returns the operations of the layer as vLLM's compiler sees them: one graph, without running
    it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lambda *args: (torch.zeros(5, sum(WIDTHS), dtype=dtype),)

    torch.compile(lambda x: scheme.apply_weights(layer, x), backend=backend, fullgraph=True)(
        torch.randn(5, K, dtype=dtype)
    )
    (graph,) = graphs
    return [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")]


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_compiler_sees_one_hopper_operation(hopper_and_marlin_run, lora):
    scheme = deciding("hopper", lora)
    layer, _ = load(scheme, dtype=torch.bfloat16)
    operations = [o for o in traced(scheme, layer, torch.bfloat16) if "qerl_hopper" in o or "mm" in o]
    assert operations == ["qerl_hopper.nvfp4_lora_gemm" if lora else "qerl_hopper.nvfp4_gemm"]


def test_the_compiler_takes_the_reference_in_one_graph():
    scheme = deciding("pytorch")
    layer, _ = load(scheme)
    assert any("addmm_" in o for o in traced(scheme, layer, torch.float32))


def test_the_setting_names_the_candidates():
    from qerl_verl.config.settings import ROLLOUT_KERNELS

    assert set(ROLLOUT_KERNELS) == {"auto"} | {candidate.name for candidate in CANDIDATES}


@pytest.mark.parametrize("input_activations", [None, "as the weights"])
def test_vllms_configuration_builds_the_layer_with_the_settings_of_the_engine(capsys, input_activations):
    """It also accepts a W4A4 checkpoint, and does without an FP8 cache, which the actor has not.
    The configuration is pickled on its way to vLLM's workers."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from qerl_verl.nvfp4.format import QUANTIZATION_CONFIG
    from qerl_verl.rollout.quantization import QeRLCompressedTensorsConfig

    written = copy.deepcopy(QUANTIZATION_CONFIG)
    group = written["config_groups"]["group_0"]
    group["input_activations"] = input_activations and {**group["weights"], "dynamic": "local"}
    written["kv_cache_scheme"] = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    config = pickle.loads(pickle.dumps(QeRLCompressedTensorsConfig.from_config(written)))
    assert config.kv_cache_scheme is None
    settings = {"qerl": {"kernel": "pytorch", "lora": {"rank": RANK, "alpha": 16}}}
    with set_current_vllm_config(VllmConfig(additional_config=settings)):
        scheme = config.get_scheme(nn.Linear(K, sum(WIDTHS)), "model.layers.0.mlp.down_proj")
        load(scheme)
    assert "(qerl.rollout.kernel): 1 layer (qkv_proj 1); adapter of rank 8 in the layer" in capsys.readouterr().out


NET = "model.layers.0.linear_attn"
FUSED_OF_NETS = {"in_proj_qkvz": ["in_proj_qkv", "in_proj_z"], "in_proj_ba": ["in_proj_b", "in_proj_a"]}
"""packed_modules_mapping of vllm/model_executor/models/qwen3_5.py."""


def checkpoint_settings():
    """Returns what config.json of a quantized Qwen3.5 says about its quantization."""
    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.format import QUANTIZATION_CONFIG

    row = get_architecture({"architectures": ["Qwen3_5ForCausalLM"]})
    return copy.deepcopy(QUANTIZATION_CONFIG) | {"ignore": list(row.plain_modules)}


@pytest.mark.parametrize("stock", [True, False])
def test_vllm_packs_the_large_linears_of_a_delta_net_alone(stock):
    """Stock vLLM reads the same from the checkpoint's config.json as this package."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    from qerl_verl.rollout.quantization import QeRLCompressedTensorsConfig

    config = (CompressedTensorsConfig if stock else QeRLCompressedTensorsConfig).from_config(checkpoint_settings())
    config.packed_modules_mapping = FUSED_OF_NETS
    with set_current_vllm_config(VllmConfig()):
        linear = nn.Linear(K, K)
        packed = {
            name: config.get_scheme_dict(linear, f"{NET}.{name}") is not None
            for name in ("in_proj_qkvz", "out_proj", "in_proj_ba")
        }
    assert packed == {"in_proj_qkvz": True, "out_proj": True, "in_proj_ba": False}


def test_a_fused_layer_of_a_delta_net_is_its_two_linears_with_their_adapters():
    """in_proj_qkv belongs to three of the layer's four projections, as vLLM's models load it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    from qerl_verl.rollout.quantization import QeRLCompressedTensorsConfig

    config = QeRLCompressedTensorsConfig.from_config(checkpoint_settings())
    config.packed_modules_mapping = FUSED_OF_NETS
    settings = {"qerl": {"kernel": "pytorch", "lora": {"rank": RANK, "alpha": 16}}}
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig(additional_config=settings)):
        layer = MergedColumnParallelLinear(
            K, [64, 64, 128, 128], bias=False, quant_config=config, prefix=f"{NET}.in_proj_qkvz", disable_tp=True,
            params_dtype=torch.float32,
        )  # fmt: skip
    weights, tensors, deltas = [], {}, []
    for name, rows, places in (("in_proj_qkv", 256, (0, 1, 2)), ("in_proj_z", 128, 3)):
        value = torch.tensor([9000.0])
        packed, scale = quantize_nvfp4(torch.randn(rows, K) * 0.05, value)
        for part, tensor in (("packed", packed), ("scale", scale), ("global_scale", value)):
            parameter = getattr(layer, f"weight_{part}")
            parameter.weight_loader(parameter, tensor, places)
        weights.append(dequantize_nvfp4(packed, scale, value, torch.float32))
        a, b = torch.randn(RANK, K), torch.randn(rows, RANK)
        tensors |= {f"{NET}.{name}.lora_A.weight": a, f"{NET}.{name}.lora_B.weight": b}
        deltas.append(LORA.scaling * b @ a)
    layer.quant_method.process_weights_after_loading(layer)
    x, weight = torch.randn(5, K), torch.cat(weights)
    torch.testing.assert_close(layer(x)[0], nn.functional.linear(x, weight), rtol=1e-4, atol=1e-4)
    modules = {"in_proj_qkvz": layer}
    for part in ("linear_attn", "0", "layers", "model"):
        modules = {part: nn.ModuleDict(modules)}
    AdapterStore(nn.ModuleDict(modules), 0, 1).load(tensors.items(), LORA.scaling)
    expected = nn.functional.linear(x, weight + torch.cat(deltas))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)
