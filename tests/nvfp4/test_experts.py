"""Tests the NVFP4 experts against transformers' own with decoded weights in float64."""

import copy

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qerl_verl.kernels import nvfp4_grouped_linear as op
from qerl_verl.kernels.backends import get_backend
from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_experts import ExpertStack, expert_factors, nvfp4_experts_reference
from qerl_verl.nvfp4.experts import STACKS, NVFP4Experts
from qerl_verl.nvfp4.loading import load_tensors, packed_linear_names, prepack_linears, swap_linears
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from tests.helpers.tiny_families import make_family

NAME = "Qwen3MoeForCausalLM"
EXPERTS = "model.layers.0.mlp.experts"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    quantize_checkpoint(make_family(NAME, folder / "source"), folder / "quantized", progress=False)
    return folder / "quantized"


def build(folder, dtype=torch.float32, storage_dtype=torch.uint8):
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    swap_linears(model, packed_linear_names(folder), dtype, storage_dtype)
    return model.requires_grad_(False)


def load(folder, dtype=torch.float32, storage_dtype=torch.uint8):
    model = build(folder, dtype, storage_dtype)
    load_tensors(model, folder, dtype)
    return model


def transformers_experts(experts, config):
    """Returns transformers' module, eager, with the decoded weights in float64."""
    config._experts_implementation = "eager"
    with torch.device("cpu"):
        plain = Qwen3MoeExperts(config).double()
    for stack in STACKS:
        getattr(plain, stack).data = experts.dequantize(stack, torch.float64)
    return plain.requires_grad_(False)


def routing(tokens, config, dtype):
    generator = torch.Generator().manual_seed(3)
    scores = torch.rand(tokens, config.num_experts, generator=generator)
    scores[:, 2] = -1  # one expert has no tokens
    weights, index = scores.topk(config.num_experts_per_tok, -1)
    return index, weights.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_transformers(checkpoint, dtype):
    model = load(checkpoint)
    experts = model.get_submodule(EXPERTS)
    assert isinstance(experts, NVFP4Experts)
    plain = transformers_experts(experts, model.config)
    index, weights = routing(19, model.config, dtype)
    x = torch.randn(19, 128).to(dtype)
    grad = torch.randn(19, 128).to(dtype)
    results = []
    for module, wide in ((experts, dtype), (plain, torch.float64)):
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, weights)]
        y = module(leaves[0], index, leaves[1])
        y.backward(grad.to(wide))
        assert y.dtype == wide
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    bound = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_actor_and_rollout_compute_the_same_mixture(checkpoint, dtype, bound):
    """Their references differ in where they round alone."""
    experts = load(checkpoint).get_submodule(EXPERTS)
    scales, count = experts.weight_global_scale, experts.num_experts
    scales[:, 1] *= 1.5  # gate and up need not share a scale
    stacks = []
    for stack, factors in zip(STACKS, expert_factors(scales[:, :2], scales[:, 2]), strict=True):
        packed, scale = experts.backends[stack].unpack(*experts.weight_bytes(stack))
        stacks.append(ExpertStack(*(t.view(count, -1, t.shape[-1]) for t in (packed, scale)), factors))
    x = torch.randn(19, 128).to(dtype)
    index, weights = routing(19, AutoConfig.from_pretrained(checkpoint), dtype)
    rollout = nvfp4_experts_reference(x, weights, index, *stacks)
    assert (experts(x, index, weights) - rollout).norm() < bound * rollout.norm()


def test_autocast(checkpoint):
    """Rows are computed in autocast's dtype, and the gradient has the input's dtype."""
    experts = load(checkpoint).get_submodule(EXPERTS)
    x = torch.randn(5, 128, requires_grad=True)
    index, weights = routing(5, AutoConfig.from_pretrained(checkpoint), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, index, weights)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert torch.equal(y, experts(x.detach().bfloat16(), index, weights))


def test_checkpointing_changes_no_bit_and_skips_the_last_gemm(checkpoint, monkeypatch):
    """The second run of a checkpointed layer ends before the experts' down projection."""
    experts = load(checkpoint).get_submodule(EXPERTS)
    index, weights = routing(9, AutoConfig.from_pretrained(checkpoint), torch.float32)
    x, calls = torch.randn(9, 128), []
    grouped_mm = op.grouped_mm

    def counted(x, weights, groups, transposed=False):
        calls.append((weights.n, transposed))
        return grouped_mm(x, weights, groups, transposed)

    monkeypatch.setattr(op, "grouped_mm", counted)
    gradients = []
    for checkpointed in (False, True):
        leaf = x.clone().requires_grad_()
        calls.clear()
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(experts, leaf, index, weights, use_reentrant=False)
        else:
            y = experts(leaf, index, weights)
        y.sin().sum().backward()
        gradients.append(leaf.grad)
    up, down = (96, False), (128, False)
    assert calls == [up, down, up, (128, True), (96, True)]  # forward, second run, backward
    assert torch.equal(*gradients)


def test_bytes_survive_the_carrier_of_fsdp(checkpoint):
    """As float32, which FSDP2 gathers, the bytes are unchanged; one parameter holds a layer's
    experts."""
    one, other = (
        load(checkpoint, storage_dtype=dtype).get_submodule(EXPERTS) for dtype in (torch.uint8, torch.float32)
    )
    assert [name for name, _ in other.named_parameters()] == ["weight_joined"]
    assert torch.equal(one.weight_joined, other.weight_joined.view(torch.uint8))
    tensors = load_file(checkpoint / "model.safetensors")
    for name, view in other.parts().items():
        assert torch.equal(view.view(torch.uint8), tensors[f"{EXPERTS}.{name}"].view(torch.uint8))


def test_the_kernel_line_counts_experts(checkpoint):
    model = load(checkpoint)
    said = prepack_linears(model, CPU)
    assert "gate_up_proj 1" in said and "q_proj 2" in said and "down_proj 2" in said
    with pytest.raises(ValueError, match="qerl.kernel=hopper cannot run on cpu"):
        model.get_submodule(EXPERTS).use_backend(CPU, "hopper", name=EXPERTS)


def test_experts_in_16_bits(checkpoint, tmp_path):
    """A layer in ``ignore`` keeps transformers' module, filled from one matrix for each expert."""
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [n.removesuffix(".weight_packed") for n in tensors if ".experts." in n and n.endswith("_packed")]:
        parts = [tensors.pop(f"{name}.weight_{part}") for part in ("packed", "scale", "global_scale")]
        tensors[f"{name}.weight"] = dequantize_nvfp4(*parts)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    model = load(tmp_path, torch.bfloat16)
    experts, packed = model.get_submodule(EXPERTS), load(checkpoint).get_submodule(EXPERTS)
    for stack in STACKS:
        assert torch.equal(getattr(experts, stack), packed.dequantize(stack))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["pytorch", "triton", "hopper"])
def test_on_a_gpu(backend):
    """Checks outputs, gradients, and memory without decoded weights, in bfloat16, for each
    backend."""
    device = torch.device("cuda", 0)
    if reason := get_backend(backend).unsupported_device(device):
        pytest.skip(reason)
    config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=128, num_experts=32, num_experts_per_tok=4)
    experts = NVFP4Experts(32, 256, 128, torch.nn.SiLU(), device=device)
    generator = torch.Generator(device).manual_seed(0)
    for stack in STACKS:
        packed, scale = experts.weight_bytes(stack)
        packed.random_(0, 256, generator=generator)
        values = torch.rand(scale.shape, generator=generator, device=device) * 300 + 20
        scale.copy_(values.to(torch.float8_e4m3fn).view(torch.uint8))
    experts.weight_global_scale.copy_(3e3 * (1 + torch.rand(32, 3)))
    plain = transformers_experts(experts, config).to(device)
    assert set(experts.use_backend(device, backend)) == set(STACKS)
    index, weights = (t.to(device) for t in routing(96, config, torch.bfloat16))
    x, grad = (torch.randn(96, 256, generator=generator, device=device).bfloat16() for _ in range(2))
    results, before = [], torch.cuda.memory_allocated()
    for module, dtype in ((experts, torch.bfloat16), (plain, torch.float64)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weights)]
        y = module(leaves[0], index, leaves[1])
        if module is experts:
            decoded = 2 * sum(rows * columns for rows, columns in map(experts.shape_of, STACKS))
            assert torch.cuda.memory_allocated() - before < decoded / 2
        y.backward(grad.to(dtype))
        results.append((y.detach(), *(leaf.grad for leaf in leaves)))
    for found, expected in zip(*results, strict=True):
        assert (found.double() - expected).norm() < 2e-2 * expected.norm()


INCOMPLETE = [
    ("3.up_proj", "packs 11 linears of 4 experts; model.layers.0.mlp.experts.3.up_proj is missing or extra"),
    ("0.gate_proj", "model.layers.0.mlp.experts.0.gate_proj is missing or extra"),
]


@pytest.mark.parametrize(("lacks", "said"), INCOMPLETE)
def test_some_experts_alone_are_refused(checkpoint, lacks, said):
    names = packed_linear_names(checkpoint) - {f"{EXPERTS}.{lacks}"}
    config = AutoConfig.from_pretrained(checkpoint)
    del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with pytest.raises(ValueError, match=said):
        swap_linears(model, names, torch.float32)


def test_a_missing_expert_is_named(checkpoint, tmp_path):
    model = build(checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[f"{EXPERTS}.1.down_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="missing .*experts.1.down_proj.weight_scale"):
        load_tensors(model, tmp_path, torch.float32)
