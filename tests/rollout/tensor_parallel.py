"""Helps the test of an engine on two ranks (`test_live_engine.py`) and the benchmark of two GPUs.

It has a sync to every rank, and the shards that each rank must hold.
"""

from __future__ import annotations

import asyncio
import os
import threading

import torch
from safetensors.torch import load_file

FILE = "adapter_model.safetensors"


def sync(engine, adapter, ranks: int) -> None:
    """Syncs an adapter as verl does: each actor rank streams it through shared memory to one
    worker.

    Args:
        engine: vLLM's engine, started with ``VERL_RAY_JOB_ID`` set to this process's id.
        adapter: folder in PEFT's format.
    """
    from peft import LoraConfig
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    tensors = load_file(f"{adapter}/{FILE}")
    config = LoraConfig.from_pretrained(adapter)
    wanted = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias")
    peft_config = {k: v for k, v in config.to_dict().items() if k in wanted}
    peft_config["target_modules"] = list(config.target_modules)
    senders = [
        BucketedWeightSender(
            zmq_handle=f"ipc:///tmp/rl-colocate-zmq-{os.getpid()}-replica-0-rank-{rank}.sock",
            bucket_size_mb=8,
            use_shm=True,
        )
        for rank in range(ranks)
    ]
    # daemons: when a worker refuses the adapter, its sender waits for ever
    threads = [
        threading.Thread(target=lambda s=s: asyncio.run(s.async_send_weights(iter(tensors.items()))), daemon=True)
        for s in senders
    ]
    for thread in threads:
        thread.start()
    arguments = {"peft_config": peft_config, "base_sync_done": True, "use_shm": True}
    engine.collective_rpc("update_weights_from_ipc", timeout=60, kwargs=arguments)
    for thread in threads:
        thread.join(timeout=60)


def expected_shards(adapter, layer: int, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Returns the part of an adapter that a rank's layer must hold, float32, in the checkpoint's
    order.

    The adapter has the rank of the buffers. Column-parallel layers have all of A and the rows of B
    of the rank's heads or channels; row-parallel layers have columns of A and all of B. Fused
    projections are concatenated.
    """
    tensors = load_file(f"{adapter}/{FILE}")

    def whole(name: str, part: str) -> torch.Tensor:
        return tensors[f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight"].float()

    def mine(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(ranks, dim)[rank]

    out = {}
    for fused, names in {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }.items():
        out[f"{fused}.qerl_lora_a"] = torch.cat([whole(n, "A") for n in names])
        out[f"{fused}.qerl_lora_b"] = torch.cat([mine(whole(n, "B"), 0) for n in names])
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        out[f"{name}.qerl_lora_a"] = mine(whole(name, "A"), 1)
        out[f"{name}.qerl_lora_b"] = whole(name, "B")
    return out


def prompt_log_probabilities(engine, prompts: list[list[int]]) -> list[float]:
    """Returns the log-probabilities of all prompt tokens but the first, given the tokens before."""
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return [
        places[token].logprob
        for prompt, output in zip(prompts, outputs, strict=True)
        for token, places in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    ]
