"""The NVFP4 linears of vLLM, one layer at a time: loaded as vLLM does, against the dequantized weight."""

import pytest
import torch
from torch import nn
from vllm.model_executor import parameter

from qerl_verl.kernels import backends
from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_quantize import quantize_nvfp4
from qerl_verl.rollout.lora import AdapterStore, LoraSettings
from qerl_verl.rollout.scheme import AdapterOnVLLMScheme, QeRLNVFP4Scheme

K, WIDTHS, RANK = 128, [256, 128, 128], 8
LORA = LoraSettings(rank=RANK, alpha=16)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def load(scheme, global_scales=(9000.0, 9000.0, 9000.0), dtype=torch.float32):
    """A fused q, k, v layer after vLLM's loading; the weight in float32."""
    torch.manual_seed(0)
    layer, parts = nn.Module(), []
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
        parts.append(dequantize_nvfp4(packed, scale, torch.tensor([value]), torch.float32))
        begin += width
    scheme.process_weights_after_loading(layer)
    return layer, torch.cat(parts)


def adapt(layer):
    """Load an adapter into the layer; its delta of the weight."""
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
@pytest.mark.parametrize("global_scales", [(9000.0, 9000.0, 9000.0), (9000.0, 5000.0, 12345.0)])
def test_a_layer_is_the_dequantized_weight_and_its_adapter(global_scales, lora, bias):
    """Also where the fused projections were quantized one by one, as llm-compressor may do."""
    scheme = QeRLNVFP4Scheme("auto", lora)
    layer, weight = load(scheme, global_scales)
    b, x = torch.randn(sum(WIDTHS)) if bias else None, torch.randn(5, K)
    if lora:
        torch.testing.assert_close(scheme.apply_weights(layer, x, b), nn.functional.linear(x, weight, b))
        weight = weight + adapt(layer)
    torch.testing.assert_close(
        scheme.apply_weights(layer, x, b), nn.functional.linear(x, weight, b), rtol=1e-4, atol=1e-4
    )
    assert {n for n, _ in layer.named_parameters()} == {"weight_packed", "weight_scale", "weight_global_scale"}


def test_an_adapter_on_a_scheme_of_vllms():
    scheme = AdapterOnVLLMScheme(QeRLNVFP4Scheme("auto"), LORA)
    layer, weight = load(scheme)
    x = torch.randn(2, 3, K)
    weight = weight + adapt(layer)
    torch.testing.assert_close(scheme.apply_weights(layer, x), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_an_input_width_off_the_block_names_the_setting():
    with pytest.raises(ValueError, match="rollout.tensor_model_parallel_size"):
        QeRLNVFP4Scheme().create_weights(nn.Module(), [64], 56, torch.bfloat16, None)


def traced(scheme, layer, dtype):
    """The operations of the layer as vLLM's compiler sees them: one graph, without running it."""
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
def test_the_compiler_sees_one_hopper_operation(monkeypatch, lora):
    monkeypatch.setattr(backends, "unavailable", lambda name, device: None)
    scheme = QeRLNVFP4Scheme("hopper", lora)
    layer, _ = load(scheme, dtype=torch.bfloat16)
    operations = [o for o in traced(scheme, layer, torch.bfloat16) if "qerl_hopper" in o or "mm" in o]
    assert operations == ["qerl_hopper.nvfp4_lora_gemm" if lora else "qerl_hopper.nvfp4_gemm"]


def test_the_compiler_takes_the_reference_in_one_graph():
    scheme = QeRLNVFP4Scheme("pytorch", LORA)
    layer, _ = load(scheme)
    assert any("addmm_" in o for o in traced(scheme, layer, torch.float32))
