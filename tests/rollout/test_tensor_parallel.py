"""A real vLLM engine whose model is divided over two ranks: what each holds of adapter and noise, and what they compute together.

One rank's engine is the reference. Partial sums are added in another order in bfloat16: 0.1 of a log-probability, where taking
the adapter away changes some by more than 1.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tensor_parallel import expected_shards, prompt_log_probabilities, sync  # noqa: E402
from test_live_engine import IN_LAYER, PROMPTS, adapters, cpu_platform, generate, load, running, set_noise  # noqa: E402, F401

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="drives vLLM's CPU engine inside pytest"),
]


def run(engine, paths, ranks):
    """Everything that is compared."""

    def buffers(worker):  # inside: the worker cannot import this module
        named = worker.model_runner.get_model().named_buffers()
        return {name: tensor.float().tolist() for name, tensor in named if "qerl_lora_" in name}

    out = {"base": prompt_log_probabilities(engine, PROMPTS)}
    sync(engine, paths[0], ranks)
    out["first_digests"] = engine.collective_rpc("qerl_adapter_digest")
    sync(engine, paths[1], ranks)
    out["digests"] = engine.collective_rpc("qerl_adapter_digest")
    engine.collective_rpc("qerl_load_adapter_folder", args=(paths[1],))
    out["loaded_digests"] = engine.collective_rpc("qerl_adapter_digest")
    out["adapter"] = prompt_log_probabilities(engine, PROMPTS)
    out["tokens"] = [tokens for tokens, _ in generate(engine)]
    set_noise(engine, step=2, sigma=0.05)
    out["norms"] = engine.collective_rpc("qerl_norm_weights")
    out["noised"] = prompt_log_probabilities(engine, PROMPTS)
    set_noise(engine)
    out["buffers"] = engine.collective_rpc(buffers)
    return out


@pytest.fixture(scope="module")
def found(nvfp4_checkpoint, adapters):  # noqa: F811
    from verl.plugin.platform import platform_manager

    from qerl_verl.platform.cpu import PlatformCPU

    threads, platform = os.environ.get("OMP_NUM_THREADS"), platform_manager._current_platform
    os.environ["OMP_NUM_THREADS"] = "1"  # more wait for each other when ranks share the cores
    platform_manager._current_platform = PlatformCPU()
    out = {}
    try:
        for ranks in (1, 2):
            with running(nvfp4_checkpoint, **IN_LAYER, tensor_parallel_size=ranks) as engine:
                out[ranks] = run(engine, adapters, ranks)
    finally:
        platform_manager._current_platform = platform
        os.environ.pop("OMP_NUM_THREADS")
        os.environ |= {} if threads is None else {"OMP_NUM_THREADS": threads}
    return out


@pytest.mark.parametrize("what", ["base", "adapter", "noised"])
def test_two_ranks_compute_what_one_does(found, what):
    one, two = (np.array(found[ranks][what]) for ranks in (1, 2))
    assert len(one) == sum(len(p) - 1 for p in PROMPTS)
    np.testing.assert_allclose(two, one, atol=0.1)
    for other in {"base", "adapter", "noised"} - {what}:
        assert abs(one - found[1][other]).max() > 0.3


def test_two_ranks_choose_the_same_tokens_up_to_ties(found):
    assert [t[:2] for t in found[2]["tokens"]] == [t[:2] for t in found[1]["tokens"]]


def test_each_rank_holds_its_part_of_the_adapter(found, adapters):  # noqa: F811
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
