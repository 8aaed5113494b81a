"""Lets every rollout worker of a main_ppo say, after each weight sync and its noise, which adapter
and which norms it has.

Plugged in as ``trainer.v1.sampler.custom_sampler`` (``pkg://tests.integration.watch_replicas``,
``WatchedReplayBuffer``, verl's own under another name), with the folder in ``QERL_TEST_WATCH`` and
``VLLM_ALLOW_INSECURE_SERIALIZATION=1``: a function goes to vLLM's workers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

UNDIVIDED = ("qkv_proj.qerl_lora_a", "gate_up_proj.qerl_lora_a", "o_proj.qerl_lora_b", "down_proj.qerl_lora_b")
"""The half of a layer's adapter that every worker has whole, also where workers divide the
model."""


def report(worker, folder: str, step: int, sigma: float) -> None:
    """Writes, in a worker of vLLM, one more line in this worker's file."""
    from qerl_verl.rollout.probes import adapter_digest, base_digest, norm_weights

    norms = hashlib.sha256(json.dumps(norm_weights(worker), sort_keys=True).encode()).hexdigest()
    undivided = hashlib.sha256()
    for name, tensor in sorted(worker.model_runner.get_model().named_buffers()):
        if name.endswith(UNDIVIDED):
            undivided.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    line = {"step": step, "sigma": sigma, "adapter": adapter_digest(worker), "norms": norms}
    line["undivided"] = undivided.hexdigest()
    replica = os.environ.get("VERL_REPLICA_RANK", "0")
    with Path(folder, f"replica_{replica}_rank_{worker.rank}.jsonl").open("a") as file:
        file.write(json.dumps(line | {"base": base_digest(worker)}) + "\n")


def read(folder: str | Path) -> dict:
    """``syncs``: by worker, its lines; and what follows from them.

    Returns:
        ``norms_equal``: all workers had the same norms after every sync; ``adapters_equal``: the
        same adapter, which workers that
        divide a model do not; ``undivided_equal``: what they hold whole of it; ``adapters_move``: a
        worker never had the same adapter in two steps; ``base_constant``.
    """
    syncs = {
        f.stem: [json.loads(line) for line in f.read_text().splitlines()] for f in sorted(Path(folder).glob("*.jsonl"))
    }
    rounds = list(zip(*syncs.values(), strict=True))
    last = [{line["step"]: line["adapter"] for line in lines} for lines in syncs.values()]
    return {
        "syncs": syncs,
        "workers": len(syncs),
        "rounds": len(rounds),
        "norms_equal": all(len({line["norms"] for line in lines}) == 1 for lines in rounds),
        "adapters_equal": all(len({line["adapter"] for line in lines}) == 1 for lines in rounds),
        "undivided_equal": all(len({line["undivided"] for line in lines}) == 1 for lines in rounds),
        "adapters_move": all(len(set(steps.values())) == len(steps) for steps in last),
        "base_constant": all(len({line["base"] for line in lines}) == 1 for lines in syncs.values()),
    }


def _watch() -> None:
    import ray

    from qerl_verl.trainer.noise import NoiseMixin

    push = NoiseMixin._push
    if push.__name__ == "watched":
        return
    folder = Path(os.environ["QERL_TEST_WATCH"])
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.jsonl"):
        file.unlink()

    def watched(self, replicas: list, step: int, sigma: float) -> None:
        push(self, replicas, step, sigma)
        servers = [replica.server_handle for replica in replicas]
        ray.get([s.collective_rpc.remote(report, args=(str(folder), step, sigma)) for s in servers])

    NoiseMixin._push = watched


def __getattr__(name: str):  # not wanted in vLLM's workers
    if name == "WatchedReplayBuffer":
        from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

        _watch()
        return type(name, (ReplayBuffer,), {})
    raise AttributeError(name)
