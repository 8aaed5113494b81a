"""Tests a real vLLM engine on the NVFP4 base: adapters and noise change, and the base stays."""

import contextlib
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qerl_verl.aqn.noise import draw_noise
from qerl_verl.job import JOB_ENV, Job
from qerl_verl.lora.peft import save_adapter
from qerl_verl.lora.wire import CONFIG_TENSOR, pack_config
from qerl_verl.nvfp4.model_shapes import adaptable_shapes
from qerl_verl.nvfp4.quantize import quantize_checkpoint
from qerl_verl.rollout.probes import adapter_digest, base_digest, norm_weights
from tests.helpers import tiny_families
from tests.helpers.jobs import sharing_job
from tests.rollout.tensor_parallel import expected_shards, prompt_log_probabilities
from tests.rollout.tensor_parallel import sync as sync_ranks

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="drives vLLM's CPU engine inside pytest"),
]

PROMPTS = [list(range(5 + i, 25 + i)) for i in range(4)]
RANK, ALPHA = 8, 16
FILE = "adapter_model.safetensors"
LORA = {"rank": RANK, "alpha": ALPHA}
IN_LAYER = {"additional_config": {"qerl": {"kernel": "auto", "lora": LORA, "sleep_level": 1, "noise": True}}}
PUNICA = {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK}


@contextlib.contextmanager
def running(checkpoint, dtype="bfloat16", **settings):
    """Yields a vLLM engine as verl starts it."""
    environment = {
        JOB_ENV: os.environ.get(JOB_ENV) or Job().environment()[JOB_ENV],
        "VERL_PLATFORM": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a test sends a function to the worker
        "VERL_RAY_JOB_ID": str(os.getpid()),  # part of the name of verl's socket
    }
    before = {k: os.environ.get(k) for k in environment}
    os.environ.update(environment)
    from vllm import LLM

    llm = LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="mp",
        dtype=dtype,
        max_model_len=128,
        worker_extension_cls="qerl_verl.rollout.worker.QeRLWorkerExtension",
        **settings,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def engine(nvfp4_checkpoint):
    """Provides an engine with the adapter in the layers."""
    with running(nvfp4_checkpoint, **IN_LAYER) as llm:
        yield llm


def generate(engine, lora_request=None):
    """Returns greedy tokens and their log-probabilities."""
    from vllm import SamplingParams

    engine.reset_prefix_cache()
    parameters = SamplingParams(max_tokens=6, temperature=0, logprobs=0, detokenize=False, ignore_eos=True)
    outputs = engine.generate(
        [{"prompt_token_ids": p} for p in PROMPTS], parameters, lora_request=lora_request, use_tqdm=False
    )
    return [
        (tuple(o.outputs[0].token_ids), tuple(next(iter(p.values())).logprob for p in o.outputs[0].logprobs))
        for o in outputs
    ]


def load(engine, adapter=None):
    """Puts the adapter of a folder, or none, into the layers."""
    if adapter:
        (count,) = engine.collective_rpc("qerl_load_adapter_folder", args=(adapter,))
        assert count == 28
    else:
        engine.collective_rpc("qerl_load_adapter", args=({}, ALPHA / RANK))


def digests(engine):
    """Returns the digests of the base and of the adapter."""
    return engine.collective_rpc(base_digest), engine.collective_rpc(adapter_digest)


def norms(engine):
    (weights,) = engine.collective_rpc(norm_weights)
    return {name: np.array(w, dtype=np.float32) for name, w in weights.items()}


def set_noise(engine, **arguments):
    engine.collective_rpc("qerl_set_noise", kwargs={"seed": 1, "step": 1, "sigma": 0.0, **arguments})


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, nvfp4_checkpoint):
    """Returns two adapters as the trainer saves them."""
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
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, inputs) * 0.2
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK) * 0.2
        targets = [n.split(".")[1] for n in shapes]
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=targets)
        save_adapter(folder / f"adapter{number}", tensors, config, str(nvfp4_checkpoint))
        paths.append(str(folder / f"adapter{number}"))
    return paths


def log_probabilities(model, prompt, tokens):
    """Returns the log-probabilities of an engine's tokens, and of the best token at each position,
    by a transformers model.
    """
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0], logits.max(-1).values


class Reference:
    """transformers and PEFT on the decoded weights, in float32, with the distance to bfloat16.

    Args:
        checkpoint: the decoded model.
        adapter: folder of an adapter, or None.
    """

    def __init__(self, checkpoint, adapter=None):
        self.model, rounded = (self._load(checkpoint, adapter, dtype) for dtype in (torch.float32, torch.bfloat16))
        prompts = [(prompt[:1], prompt[1:]) for prompt in PROMPTS]
        errors = [log_probabilities(rounded, *p)[0].float() - log_probabilities(self.model, *p)[0] for p in prompts]
        self.rounding = rms(torch.cat(errors))
        """Root mean square over the tokens of the prompts."""

    @staticmethod
    def _load(checkpoint, adapter, dtype):
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
        return PeftModel.from_pretrained(model, adapter).to(dtype) if adapter else model

    def check(self, outputs):
        """Checks that an engine's tokens have the reference's log-probabilities and are its best,
        within bfloat16.
        """
        errors = []
        for prompt, (tokens, found) in zip(PROMPTS, outputs, strict=True):
            expected, best = log_probabilities(self.model, prompt, tokens)
            errors.append(torch.tensor(found) - expected)
            assert (best - expected).max() < 12 * self.rounding  # a tie within the rounding of both
        assert rms(torch.cat(errors)) < 3 * self.rounding


def rms(errors) -> float:
    """Returns the root mean square."""
    return float((errors**2).mean() ** 0.5)


def test_runs_the_nvfp4_base(engine, dequantized_checkpoint):
    """Tokens and log-probabilities agree with transformers on the decoded weights, within
    bfloat16."""
    load(engine)
    Reference(dequantized_checkpoint).check(generate(engine))


def test_adapters_a_b_a_give_a_again_and_the_base_never_changes(engine, adapters, dequantized_checkpoint):
    load(engine)
    base, (base_digest, no_adapter) = generate(engine), digests(engine)
    results, seen = [], [no_adapter]
    for adapter in (*adapters, adapters[0]):
        load(engine, adapter)
        results.append(generate(engine))
        digest, adapter_digest = digests(engine)
        assert digest == base_digest
        seen.append(adapter_digest)
    first, second, third = results
    assert first == third and seen[1] == seen[3]
    assert first != second and first != base and second != base and len({str(d) for d in seen}) == 3
    load(engine)
    assert generate(engine) == base and digests(engine) == (base_digest, no_adapter)
    Reference(dequantized_checkpoint, adapters[0]).check(first)


@pytest.fixture
def actors_base(nvfp4_checkpoint, monkeypatch):
    """Provides a base of this process, which stands for the actor's."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    from qerl_verl.nvfp4.architectures import get_architecture
    from qerl_verl.nvfp4.candidates import CANDIDATES
    from qerl_verl.nvfp4.loading import packed_linear_names, swap_linears
    from qerl_verl.sharing.base import OtherSide, load_base, plan_layout
    from qerl_verl.sharing.channel import BaseOwner
    from qerl_verl.sharing.memory import SharedMemory

    cpu, dtype = torch.device("cpu"), torch.bfloat16
    config = AutoConfig.from_pretrained(nvfp4_checkpoint)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    swap_linears(model, packed_linear_names(nvfp4_checkpoint), dtype)
    other = OtherSide("auto", CANDIDATES, RANK, dtype)
    layout = plan_layout(model, get_architecture(config), cpu, dtype, "auto", other)
    memory = SharedMemory.allocate(layout.size, cpu)
    layout, _ = load_base(model, nvfp4_checkpoint, layout, memory, dtype, dtype, "auto")
    job = sharing_job(rank=RANK)
    owner = BaseOwner((memory, layout), job.sharing.key, 0)
    for name, value in {**job.environment(), "VERL_REPLICA_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    yield
    owner.close()


def make_finder():
    """Returns a worker's function that names the parameters in the memory of another process."""

    def find(worker):
        model = worker.model_runner.get_model()
        data = model.qerl_shared_base.data
        begin, end = data.data_ptr(), data.data_ptr() + data.numel()
        return [name for name, p in model.named_parameters() if begin <= p.data_ptr() < end]

    return find


def test_an_engine_on_the_actors_base_is_the_same_engine(engine, adapters, actors_base, nvfp4_checkpoint):
    """With qerl.base=shared, base, adapters A, B, A and noise are equal bit for bit, on this
    process's memory.
    """

    def behaviour(engine):
        load(engine)
        seen = [generate(engine), digests(engine)]
        for adapter in (*adapters, adapters[0]):
            load(engine, adapter)
            seen += [generate(engine), digests(engine)]
        set_noise(engine, step=2, sigma=0.05)
        seen += [generate(engine), {name: weight.tolist() for name, weight in norms(engine).items()}]
        set_noise(engine)
        return [*seen, digests(engine)]

    expected = behaviour(engine)
    with running(nvfp4_checkpoint, load_format="qerl_shared", **IN_LAYER) as other:
        (inside,) = other.collective_rpc(make_finder())
        assert behaviour(other) == expected
    names = {name.rpartition(".")[2] for name in inside}
    assert names == {"weight_packed", "weight_scale", "weight"} and len(inside) == 2 * 4 * 2 + 1


@pytest.fixture
def with_kv_cache_scheme(tmp_path, nvfp4_checkpoint):
    """Returns the checkpoint as llm-compressor writes it with an FP8 KV cache, here one scale for
    each head."""
    folder = shutil.copytree(nvfp4_checkpoint, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = scheme
    (folder / "config.json").write_text(json.dumps(config))
    file = next(folder.glob("*.safetensors"))
    names = (f"model.layers.{i}.self_attn.{part}_scale" for i in range(2) for part in "kv")
    save_file(load_file(file) | {name: torch.full((2,), 0.03) for name in names}, file)
    return folder


def test_vllms_own_lora_path_says_the_same(
    engine, adapters, with_kv_cache_scheme, cpu_platform, dequantized_checkpoint
):
    """With qerl.rollout.lora=punica, results without an adapter are equal bit for bit, and with one
    within bfloat16. A scheme for the KV cache makes no difference.
    """
    from verl.workers.rollout.vllm_rollout.utils import VLLM_LORA_INT_ID, VLLM_LORA_NAME, VLLM_LORA_PATH
    from vllm.lora.request import LoRARequest

    ours = []
    for adapter in (None, *adapters):
        load(engine, adapter)
        ours.append(generate(engine))
    with running(with_kv_cache_scheme, **PUNICA) as other:
        assert generate(other) == ours[0]
        theirs = [generate(other, LoRARequest(os.path.basename(a), int(a[-1]) + VLLM_LORA_INT_ID, a)) for a in adapters]
        for adapter, expected in zip((*adapters, adapters[0]), (*theirs, theirs[0]), strict=True):
            sync(other, adapter, from_checkpoint_engine=True)
            assert generate(other, LoRARequest(VLLM_LORA_NAME, VLLM_LORA_INT_ID, VLLM_LORA_PATH)) == expected
    for adapter, *outputs in zip(adapters, ours[1:], theirs, strict=True):
        reference = Reference(dequantized_checkpoint, adapter)
        for found in outputs:  # not with each other: a tie within rounding may part them
            reference.check(found)


def test_noise_is_on_the_right_norms_drawn_from_seed_step_and_layer(engine, nvfp4_checkpoint):
    checkpoint = load_file(next(nvfp4_checkpoint.glob("*.safetensors")))
    expected_names = {
        f"model.layers.{i}.{n}" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")
    }
    digest = engine.collective_rpc(base_digest)
    for step in (3, 4, 3):
        set_noise(engine, seed=5, step=step, sigma=0.02)
        live = norms(engine)
        assert set(live) == expected_names
        for name, weight in live.items():
            clean = checkpoint[f"{name}.weight"].float()
            expected = clean + draw_noise(5, step, name, clean.numel(), 0.02)
            np.testing.assert_array_equal(weight, expected.numpy(), err_msg=f"{name} at step {step}")
    assert engine.collective_rpc(base_digest) == digest  # the checkpoint's norm weights, too
    set_noise(engine)


def make_probe():
    """Returns a worker's function, because the worker cannot import this module.

    The function returns, for each target, the change of the effective weight by noise. The
    effective weight is the least-squares slope of the norm's outputs on its normalized inputs, here
    from two halves of the rows.
    """

    def probe(worker, rows, seed):
        import torch

        from qerl_verl.rollout.probes import norm_weights

        def slopes(norm):
            generator, found = torch.Generator().manual_seed(seed), []
            for _ in range(2):
                x = torch.randn(rows, norm.hidden_size, generator=generator).to(norm.weight.dtype)
                unit = x.double() * (x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
                y, _ = norm(x.clone(), torch.zeros_like(x))
                found.append((y.double() * unit).sum(0) / unit.square().sum(0))
            return torch.stack(found)

        out = {}
        for name in norm_weights(worker):
            norm = worker.model_runner.get_model().get_submodule(name)
            noised, live = slopes(norm), norm.qerl_weight.clone()
            norm.qerl_weight.copy_(norm.weight)
            out[name] = (noised - slopes(norm)).tolist()
            norm.qerl_weight.copy_(live)
        return out

    return probe


@pytest.mark.parametrize("sigma", [5e-4, 1e-2])
def test_the_noise_that_acts_in_the_engines_norms_is_the_noise_that_was_drawn(engine, sigma):
    first, second = [], []
    for step in range(1, 26):  # 4 norms of 128 channels each
        engine.collective_rpc("qerl_set_noise", kwargs={"seed": 1, "step": step, "sigma": sigma})
        (found,) = engine.collective_rpc(make_probe(), args=(512, step))
        for a, b in found.values():
            first += a
            second += b
    set_noise(engine)
    first, second = np.array(first), np.array(second)
    both = (first + second) / 2
    # leaves out what rounding adds to each
    assert np.cov(first, second)[0, 1] ** 0.5 == pytest.approx(sigma, rel=0.02)
    assert abs(both.mean()) < 3 * both.std() / len(both) ** 0.5


def test_the_engine_tells_what_acts(engine):
    (found,) = engine.collective_rpc("qerl_set_noise", kwargs={"seed": 1, "step": 2, "sigma": 0.02, "unit": "relative"})
    assert found["relative"] == pytest.approx(0.02, rel=0.1)
    assert found["absolute"] == pytest.approx(found["relative"] * found["weight_median"], rel=0.2)
    (found,) = engine.collective_rpc("qerl_set_noise", kwargs={"seed": 1, "step": 2, "sigma": 0.0})
    assert found["relative"] == found["absolute"] == 0 < found["weight_min"]


def test_noise_changes_what_is_generated_and_sigma_zero_restores_it_bit_for_bit(engine, adapters):
    load(engine, adapters[0])
    clean_norms, clean = norms(engine), generate(engine)
    set_noise(engine, step=2, sigma=0.1)
    assert generate(engine) != clean
    set_noise(engine, step=7, sigma=0.05)
    set_noise(engine, sigma=0.0)
    for name, weight in norms(engine).items():
        np.testing.assert_array_equal(weight, clean_norms[name])
    assert generate(engine) == clean


def test_noise_survives_a_change_of_adapter(engine, adapters):
    set_noise(engine, step=2, sigma=0.05)
    noised = norms(engine)
    load(engine, adapters[1])
    generate(engine)
    for name, weight in norms(engine).items():
        np.testing.assert_array_equal(weight, noised[name])
    set_noise(engine)


@pytest.fixture
def cpu_platform(monkeypatch):
    """Selects the CPU platform. verl keeps the platform of the first caller in a process, which may
    have been another test.
    """
    from verl.plugin.platform import platform_manager

    from qerl_verl.platform.cpu import PlatformCPU

    monkeypatch.setattr(platform_manager, "_current_platform", PlatformCPU())


def sync(engine, adapter, from_checkpoint_engine=False):
    """Syncs an adapter as verl does: through shared memory into update_weights_from_ipc.

    From a checkpoint engine, the configuration arrives as a tensor and not as an argument.
    """
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    from peft import LoraConfig
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    tensors = load_file(f"{adapter}/{FILE}")
    config = LoraConfig.from_pretrained(adapter)
    wanted = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias")
    peft_config = {k: v for k, v in config.to_dict().items() if k in wanted}
    peft_config["target_modules"] = list(config.target_modules)
    arguments = {"peft_config": peft_config, "base_sync_done": True, "use_shm": True}
    if from_checkpoint_engine:
        tensors[CONFIG_TENSOR] = pack_config(config.to_dict())
        arguments = {"use_shm": True}
    sender = BucketedWeightSender(
        zmq_handle=f"ipc:///tmp/rl-colocate-zmq-{os.getpid()}-replica-0-rank-0.sock", bucket_size_mb=1, use_shm=True
    )
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(lambda: asyncio.run(sender.async_send_weights(iter(tensors.items()))))
        engine.collective_rpc("update_weights_from_ipc", timeout=60, kwargs=arguments)
        sending.result(timeout=10)


@pytest.mark.parametrize("from_checkpoint_engine", [False, True])
def test_weight_syncs_a_b_a_replace_the_adapter_and_leave_base_and_noise_alone(
    engine, adapters, cpu_platform, from_checkpoint_engine
):
    set_noise(engine, step=2, sigma=0.05)
    digest, noised = engine.collective_rpc(base_digest), norms(engine)
    results = []
    for adapter in (*adapters, adapters[0]):
        sync(engine, adapter, from_checkpoint_engine)
        results.append((generate(engine), digests(engine)))
    assert results[0] == results[2] and results[0][0] != results[1][0]
    load(engine, adapters[0])
    assert results[0] == (generate(engine), digests(engine))
    assert engine.collective_rpc(base_digest) == digest
    for name, weight in norms(engine).items():
        np.testing.assert_array_equal(weight, noised[name])
    set_noise(engine)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_adapter_that_is_not_finite_is_refused_by_name_and_the_old_one_stays(
    engine, adapters, cpu_platform, tmp_path, value
):
    sync(engine, adapters[0])
    before, state = generate(engine), digests(engine)
    bad = shutil.copytree(adapters[1], tmp_path / "bad")
    tensors = load_file(bad / FILE)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3, 2] = value
    save_file(tensors, bad / FILE)
    with pytest.raises(Exception, match=re.escape(f"{name} holds a value that is not finite")):
        sync(engine, str(bad))
    assert (generate(engine), digests(engine)) == (before, state)
    sync(engine, adapters[1])  # and the next sync works
    assert generate(engine) != before


def test_a_sync_that_brings_no_adapter_is_refused_and_the_old_one_stays(engine, adapters, cpu_platform, monkeypatch):
    sync(engine, adapters[0])
    state = digests(engine)
    monkeypatch.setitem(globals(), "CONFIG_TENSOR", "model.norm.weight")
    with pytest.raises(Exception, match="29 tensors without an adapter's configuration"):
        sync(engine, adapters[1], from_checkpoint_engine=True)
    assert digests(engine) == state


def test_an_adapter_that_does_not_fit_is_refused_and_the_old_one_stays(engine, adapters, cpu_platform, tmp_path):
    sync(engine, adapters[0])
    state = digests(engine)
    bad = shutil.copytree(adapters[1], tmp_path / "bad")
    tensors = {name: torch.cat((t, t), int(".lora_B." in name)) for name, t in load_file(bad / FILE).items()}
    save_file(tensors, bad / FILE)
    with pytest.raises(Exception, match="room for rank 8: set actor_rollout_ref.model.lora_rank"):
        sync(engine, str(bad))
    assert digests(engine) == state


def test_the_base_can_be_read_from_disk_again(engine, adapters):
    """This follows a sleep at level 2. The norms come back clean; adapter and noise can be set as
    before.
    """

    def lose(worker):
        for parameter in worker.model_runner.get_model().parameters():
            parameter.data.zero_()

    load(engine, adapters[0])
    (base_digest, adapter_digest), clean = digests(engine), generate(engine)
    clean_norms = norms(engine)
    set_noise(engine, step=2, sigma=0.05)
    noised_norms, noised = norms(engine), generate(engine)
    engine.collective_rpc(lose)
    assert digests(engine)[0] != base_digest and generate(engine) != noised
    engine.collective_rpc("qerl_reload_base")
    load(engine, adapters[0])
    assert digests(engine) == (base_digest, adapter_digest)
    for name, weight in norms(engine).items():
        np.testing.assert_array_equal(weight, clean_norms[name])
    assert generate(engine) == clean
    set_noise(engine, step=2, sigma=0.05)
    for name, weight in norms(engine).items():
        np.testing.assert_array_equal(weight, noised_norms[name])
    assert generate(engine) == noised
    set_noise(engine)


def run(engine, paths, ranks):
    """Returns everything that is compared."""

    def buffers(worker):  # inside: the worker cannot import this module
        named = worker.model_runner.get_model().named_buffers()
        return {name: tensor.float().tolist() for name, tensor in named if "qerl_lora_" in name}

    out = {"base": prompt_log_probabilities(engine, PROMPTS)}
    sync_ranks(engine, paths[0], ranks)
    out["first_digests"] = engine.collective_rpc(adapter_digest)
    sync_ranks(engine, paths[1], ranks)
    out["digests"] = engine.collective_rpc(adapter_digest)
    engine.collective_rpc("qerl_load_adapter_folder", args=(paths[1],))
    out["loaded_digests"] = engine.collective_rpc(adapter_digest)
    out["adapter"] = prompt_log_probabilities(engine, PROMPTS)
    out["tokens"] = [tokens for tokens, _ in generate(engine)]
    set_noise(engine, step=2, sigma=0.05)
    out["norms"] = engine.collective_rpc(norm_weights)
    out["noised"] = prompt_log_probabilities(engine, PROMPTS)
    set_noise(engine)
    out["buffers"] = engine.collective_rpc(buffers)
    return out


@pytest.fixture(scope="module")
def found(engine, nvfp4_checkpoint, adapters):
    """Returns the observations by number of ranks, one and two. It starts an engine on two
    ranks."""
    from verl.plugin.platform import platform_manager

    from qerl_verl.platform.cpu import PlatformCPU

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform_manager, "_current_platform", PlatformCPU())
        load(engine)
        out = {1: run(engine, adapters, 1)}
        patch.setenv("OMP_NUM_THREADS", "1")  # more wait for each other when ranks share the cores
        with running(nvfp4_checkpoint, **IN_LAYER, tensor_parallel_size=2) as divided:
            out[2] = run(divided, adapters, 2)
    return out


@pytest.mark.parametrize("what", ["base", "adapter", "noised"])
def test_two_ranks_compute_what_one_does(found, what, adapters, dequantized_checkpoint):
    """Partial sums are added in another order, which changes bfloat16 results less than adapter and
    noise do.
    """
    one, two = (np.array(found[ranks][what]) for ranks in (1, 2))
    assert len(one) == sum(len(p) - 1 for p in PROMPTS)
    rounding = Reference(dequantized_checkpoint, None if what == "base" else adapters[1]).rounding
    assert rms(two - one) < 3 * rounding
    for other in {"base", "adapter", "noised"} - {what}:
        assert rms(one - np.array(found[1][other])) > 4 * rounding


def test_two_ranks_choose_the_same_tokens_up_to_ties(found):
    assert [t[:2] for t in found[2]["tokens"]] == [t[:2] for t in found[1]["tokens"]]


def test_each_rank_holds_its_part_of_the_adapter(found, adapters):
    for ranks in (1, 2):
        for rank, held in enumerate(found[ranks]["buffers"]):
            expected = {
                f"model.layers.{layer}.{name}": tensor.bfloat16().float()
                for layer in range(2)
                for name, tensor in expected_shards(adapters[1], layer, rank, ranks).items()
            }
            assert held.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(torch.tensor(held[name]), tensor), name


def test_a_sync_reaches_every_rank(found):
    for ranks in (1, 2):
        seen = found[ranks]
        assert len(seen["digests"]) == ranks and seen["digests"] == seen["loaded_digests"]
        assert not set(seen["digests"]) & set(seen["first_digests"])


def test_the_noise_is_the_same_on_every_rank(found):
    (one,) = found[1]["norms"]
    assert found[2]["norms"] == [one, one]


@pytest.mark.slow
def test_a_mixture_of_experts_on_two_ranks(tmp_path, monkeypatch, cpu_platform):
    """Each rank has a part of the channels of every expert. The engine runs without an adapter, and
    with one on the attention and on the experts.
    """
    settings = dict(moe_intermediate_size=64, intermediate_size=128)
    quantize_checkpoint(
        tiny_families.make_family("Qwen3MoeForCausalLM", tmp_path / "source", **settings), tmp_path / "quantized",
        progress=False,
    )  # fmt: skip
    adapter = tiny_families.make_adapter(tmp_path / "adapter", adaptable_shapes(tmp_path / "quantized"))
    reference = tiny_families.Reference(tmp_path / "quantized")
    lora = {"rank": tiny_families.RANK, "alpha": tiny_families.ALPHA, "experts": True}
    engine_settings = {"additional_config": {"qerl": {"kernel": "auto", "lora": lora}}, "tensor_parallel_size": 2}
    # more wait for each other when ranks share the cores
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with running(tmp_path / "quantized", dtype="float32", **engine_settings) as divided:
        reference.check(PROMPTS, split(prompt_log_probabilities(divided, PROMPTS)))
        sync_ranks(divided, str(adapter), 2)
        with reference.adapted(adapter):
            reference.check(PROMPTS, split(prompt_log_probabilities(divided, PROMPTS)))


def split(values):
    """Splits the values by prompt."""
    values = iter(values)
    return [list(itertools.islice(values, len(prompt) - 1)) for prompt in PROMPTS]
