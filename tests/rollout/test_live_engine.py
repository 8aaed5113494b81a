"""A real vLLM engine on the NVFP4 base: adapters come and go, noise goes on and off, the base stays."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qerl_verl.aqn.noise import draw_noise
from qerl_verl.lora.peft import save_adapter

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="drives vLLM's CPU engine inside pytest"),
]

SYNCED = "simon_lora_path"  # VLLM_LORA_PATH of verl/workers/rollout/vllm_rollout/utils.py
PROMPTS = [list(range(5 + i, 25 + i)) for i in range(4)]


@pytest.fixture(scope="module")
def engine(nvfp4_checkpoint):
    environment = {
        "QERL_SWITCH": "nvfp4",
        "VERL_PLATFORM": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
    }
    before = {k: os.environ.get(k) for k in environment}
    os.environ.update(environment)
    from vllm import LLM

    llm = LLM(
        str(nvfp4_checkpoint),
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="mp",  # as verl starts it
        dtype="bfloat16",
        max_model_len=128,
        worker_extension_cls="qerl_verl.rollout.worker.QeRLWorkerExtension",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=8,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def generate(engine, adapter=None):
    """Greedy tokens and their log-probabilities, with an adapter folder or SYNCED, the one of the last weight sync."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine.reset_prefix_cache()
    request = None
    if adapter == SYNCED:
        request = LoRARequest("123", 123, SYNCED)
    elif adapter:
        request = LoRARequest(os.path.basename(adapter), int(adapter[-1]), adapter)
    parameters = SamplingParams(max_tokens=6, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    outputs = engine.generate(
        [{"prompt_token_ids": p} for p in PROMPTS], parameters, lora_request=request, use_tqdm=False
    )
    return [
        (tuple(o.outputs[0].token_ids), tuple(next(iter(p.values())).logprob for p in o.outputs[0].logprobs))
        for o in outputs
    ]


def norms(engine):
    (weights,) = engine.collective_rpc("qerl_norm_weights")
    return {name: np.array(w, dtype=np.float32) for name, w in weights.items()}


def set_noise(engine, **arguments):
    engine.collective_rpc("qerl_set_noise", kwargs={"seed": 1, "step": 1, "sigma": 0.0, **arguments})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, nvfp4_checkpoint):
    """Two adapters as the trainer saves them."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("adapters")
    shapes = {"q_proj": (128, 128), "k_proj": (128, 64), "v_proj": (128, 64), "o_proj": (128, 128)}
    shapes = {f"self_attn.{k}": v for k, v in shapes.items()}
    shapes |= {"mlp.gate_proj": (128, 256), "mlp.up_proj": (128, 256), "mlp.down_proj": (256, 128)}
    paths = []
    for number in (1, 2):
        torch.manual_seed(number)
        tensors = {}
        for layer in range(2):
            for name, (inputs, outputs) in shapes.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, inputs) * 0.2
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, 8) * 0.2
        config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=[n.split(".")[1] for n in shapes])
        save_adapter(folder / f"adapter{number}", tensors, config, str(nvfp4_checkpoint))
        paths.append(str(folder / f"adapter{number}"))
    return paths


def test_runs_the_nvfp4_base(engine, dequantized_checkpoint):
    """Tokens and log-probabilities agree with transformers on the dequantized weights, within bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(dequantized_checkpoint, dtype=torch.float32)
    for prompt, (tokens, found) in zip(PROMPTS, generate(engine), strict=True):
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        np.testing.assert_allclose(found, expected, atol=0.08)
        assert (logits.max(-1).values - expected).max() < 0.08  # greedy, up to ties within rounding


def test_adapters_a_b_a_give_a_again_and_the_base_never_changes(engine, adapters, dequantized_checkpoint):
    a, b = adapters
    base_digest, base = engine.collective_rpc("qerl_base_digest"), generate(engine)
    first, second, third = generate(engine, a), generate(engine, b), generate(engine, a)
    assert first == third
    assert first != second and first != base and second != base
    assert generate(engine) == base
    assert engine.collective_rpc("qerl_base_digest") == base_digest

    from peft import PeftModel

    stock = AutoModelForCausalLM.from_pretrained(dequantized_checkpoint, dtype=torch.float32)
    model = PeftModel.from_pretrained(stock, a)
    tokens, found = first[0]
    ids = torch.tensor([[*PROMPTS[0], *tokens]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
    np.testing.assert_allclose(found, logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0], atol=0.15)


def test_noise_is_on_the_right_norms_drawn_from_seed_step_and_layer(engine, nvfp4_checkpoint):
    checkpoint = load_file(next(nvfp4_checkpoint.glob("*.safetensors")))
    expected_names = {
        f"model.layers.{i}.{n}" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")
    }
    digest = engine.collective_rpc("qerl_base_digest")
    for step in (3, 4, 3):
        set_noise(engine, seed=5, step=step, sigma=0.02)
        live = norms(engine)
        assert set(live) == expected_names
        for name, weight in live.items():
            clean = checkpoint[f"{name}.weight"]
            expected = (clean.float() + draw_noise(5, step, name, clean.numel(), 0.02)).to(clean.dtype)
            np.testing.assert_array_equal(weight, expected.float().numpy(), err_msg=f"{name} at step {step}")
    assert engine.collective_rpc("qerl_base_digest") == digest  # q/k-norm-free model: everything but the noised norms
    set_noise(engine)


def test_noise_changes_what_is_generated_and_sigma_zero_restores_it_bit_for_bit(engine, adapters):
    clean_norms, clean = norms(engine), generate(engine, adapters[0])
    set_noise(engine, step=2, sigma=0.1)
    assert generate(engine, adapters[0]) != clean
    set_noise(engine, step=7, sigma=0.05)
    set_noise(engine, sigma=0.0)
    for name, weight in norms(engine).items():
        np.testing.assert_array_equal(weight, clean_norms[name])
    assert generate(engine, adapters[0]) == clean


def test_noise_survives_a_change_of_adapter(engine, adapters):
    set_noise(engine, step=2, sigma=0.05)
    noised = norms(engine)
    generate(engine, adapters[1])
    for name, weight in norms(engine).items():
        np.testing.assert_array_equal(weight, noised[name])
    set_noise(engine)


@pytest.fixture
def cpu_platform(monkeypatch):
    """verl keeps the platform that the first caller in a process asked for; here that may have been another test."""
    from verl.plugin.platform import platform_manager

    from qerl_verl.platform.cpu import PlatformCPU

    monkeypatch.setattr(platform_manager, "_current_platform", PlatformCPU())


def sync(engine, adapter):
    """What verl does at every weight sync: stream the adapter through shared memory into update_weights_from_ipc."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from peft import LoraConfig
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    config = LoraConfig.from_pretrained(adapter)
    wanted = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias")
    peft_config = {k: v for k, v in config.to_dict().items() if k in wanted}
    peft_config["target_modules"] = list(config.target_modules)
    sender = BucketedWeightSender(
        zmq_handle="ipc:///tmp/rl-colocate-zmq-0-replica-0-rank-0.sock", bucket_size_mb=1, use_shm=True
    )
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(lambda: asyncio.run(sender.async_send_weights(iter(tensors.items()))))
        arguments = {"peft_config": peft_config, "base_sync_done": True, "use_shm": True}
        engine.collective_rpc("update_weights_from_ipc", timeout=60, kwargs=arguments)
        sending.result(timeout=10)


def test_weight_syncs_a_b_a_replace_the_adapter_and_leave_base_and_noise_alone(engine, adapters, cpu_platform):
    set_noise(engine, step=2, sigma=0.05)
    digest, noised = engine.collective_rpc("qerl_base_digest"), norms(engine)
    results = []
    for adapter in (*adapters, adapters[0]):
        sync(engine, adapter)
        results.append(generate(engine, SYNCED))
    assert results[0] == results[2] != results[1]
    assert results[0] == generate(engine, adapters[0])
    assert engine.collective_rpc("qerl_base_digest") == digest
    for name, weight in norms(engine).items():
        np.testing.assert_array_equal(weight, noised[name])
    set_noise(engine)
