"""Looks into the rollout engines while they generate. ``separate_async.py`` plugs this module into
verl as its sampler.

Before each sample that the trainer takes, every vLLM worker of a replica writes a file
``{train,val}-STEP-REPLICA.json`` into the folder ``QERL_TEST_SPY``: the live norms, the digest of
its adapter, and the digest after the adapter of the checkpoint that it has to have was loaded in
its place. Wants ``VLLM_ALLOW_INSECURE_SERIALIZATION=1``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import ray
from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync


def look(worker, file: str, adapter: str) -> None:
    """Runs in a vLLM worker."""
    from qerl_verl.rollout.probes import adapter_digest, norm_weights

    found = {"norms": norm_weights(worker), "adapter": adapter_digest(worker), "checkpoint": None}
    if os.path.isdir(adapter):
        worker.qerl_load_adapter_folder(adapter)
        found["checkpoint"] = adapter_digest(worker)
    Path(f"{file}-{os.environ['VERL_REPLICA_RANK']}.json").write_text(json.dumps(found))


class SpyReplayBuffer(ReplayBufferAsync):
    """verl's, after a look. A validation finds the policy of its step, training that of the step
    before."""

    def sample(self, global_steps: int, partition_id: str, batch_size: int):
        folder = os.environ["QERL_TEST_SPY"]
        adapter = f"{folder}/checkpoints/global_step_{global_steps - (partition_id == 'train')}/actor/lora_adapter"
        arguments = (f"{folder}/{partition_id}-{global_steps}", adapter)
        # replica 0 is the one on the actor's slot, if there is one; it has an old adapter while the
        # actor trains
        for number in range(8):
            try:
                server = ray.get_actor(f"vllm_server_{number}_0")
            except ValueError:
                continue
            ray.get(server.collective_rpc.remote(look, args=arguments))
        return super().sample(global_steps, partition_id, batch_size)
