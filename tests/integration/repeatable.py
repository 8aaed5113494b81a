"""What tests plug into verl, through its own settings, so that a run can be repeated bit for bit
and stopped anywhere.

- :class:`RepeatableAgentLoop` gives each request a seed of its own: step, prompt and number within
  the group.
- :class:`RepeatableReplayBuffer` hands a batch to the trainer in an order that does not depend on
  who finished first.
- Imported as ``actor_rollout_ref.model.external_lib`` with ``QERL_TEST_HOLD`` set, it makes the
  actor wait at a named phase of a named step, see :func:`hold`.
"""

from __future__ import annotations

import io
import os
import time
import zlib
from pathlib import Path

PHASES = ("rollout", "old_log_prob", "update", "save", "sync")
HOLD_SECONDS = 120.0


def hold(phase: str, step: int) -> None:
    """Waits here if the file ``want`` in the folder ``QERL_TEST_HOLD`` says so (``update 5``),
    until that file is gone.

    ``reached`` appears beside it meanwhile.
    """
    folder = os.environ.get("QERL_TEST_HOLD")
    if not folder:
        return
    want, reached = Path(folder, "want"), Path(folder, "reached")

    def wanted() -> bool:
        try:
            return want.read_text() == f"{phase} {step}"
        except OSError:
            return False

    if not wanted() or reached.exists():
        return
    reached.write_text(str(os.getpid()))
    end = time.monotonic() + HOLD_SECONDS
    while wanted() and time.monotonic() < end:
        time.sleep(0.02)


def _make_agent_loop():
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

    class RepeatableAgentLoop(SingleTurnAgentLoop):
        async def run(self, sampling_params, **kwargs):
            step, number = kwargs["global_steps"], kwargs["session_id"]
            hold("rollout", int(step))
            seed = zlib.crc32(f"{step} {number} {list(kwargs['raw_prompt'])}".encode())
            return await super().run({**sampling_params, "seed": seed}, **kwargs)

    return RepeatableAgentLoop


def _make_replay_buffer():
    import transfer_queue as tq
    from transfer_queue import KVBatchMeta
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

    class RepeatableReplayBuffer(ReplayBuffer):
        def _materialize_batch(self, partition_id, selected_prompt_uids, partition_snapshot):
            batch = super()._materialize_batch(partition_id, selected_prompt_uids, partition_snapshot)
            data = tq.kv_batch_get(keys=batch.keys, partition_id=partition_id, select_fields=["raw_prompt"])
            prompts = [str(p) for p in data["raw_prompt"]]
            order = sorted(range(len(prompts)), key=lambda i: (prompts[i], batch.keys[i].split("_")[1:]))
            return KVBatchMeta(
                partition_id=partition_id, keys=[batch.keys[i] for i in order], tags=[batch.tags[i] for i in order]
            )

    return RepeatableReplayBuffer


def __getattr__(name: str):  # neither is wanted where the other's imports are
    if name == "RepeatableAgentLoop":
        return _make_agent_loop()
    if name == "RepeatableReplayBuffer":
        return _make_replay_buffer()
    raise AttributeError(name)


def _hold_in_the_actor() -> None:
    """Phases of the actor: wraps its engine, verl's weight sender and ``torch.save``."""
    import torch
    import verl.workers.engine  # noqa: F401  (first: its import brings the engines of QeRL in)
    from verl.workers.rollout.utils import ensure_async_iterator
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightSender

    from qerl_verl.engine.nvfp4 import NVFP4EngineWithLMHead as Engine

    current = {"step": 0}
    infer, update, save, send = (
        Engine.infer_batch,
        Engine.optimizer_step,
        torch.save,
        BucketedWeightSender.async_send_weights,
    )

    def infer_batch(self, *args, **kwargs):
        hold("old_log_prob", self.lr_scheduler.last_epoch + 1)
        return infer(self, *args, **kwargs)

    def optimizer_step(self):
        norm = update(self)
        current["step"] = self.lr_scheduler.last_epoch + 1
        hold("update", current["step"])  # after the first mini-batch of the step
        return norm

    def torch_save(obj, file, *args, **kwargs):
        if not Path(str(file)).name.startswith("optim_world_size"):
            return save(obj, file, *args, **kwargs)
        buffer = io.BytesIO()
        save(obj, buffer, *args, **kwargs)
        data = buffer.getvalue()
        with open(file, "wb") as handle:
            handle.write(data[: len(data) // 2])
            handle.flush()
            hold("save", current["step"])
            handle.write(data[len(data) // 2 :])

    async def async_send_weights(self, weights):
        async def with_hold():
            first = True
            async for item in ensure_async_iterator(weights):
                yield item
                if first:
                    hold("sync", current["step"])
                first = False

        return await send(self, with_hold())

    Engine.infer_batch, Engine.optimizer_step, torch.save = infer_batch, optimizer_step, torch_save
    BucketedWeightSender.async_send_weights = async_send_weights


if os.environ.get("QERL_TEST_HOLD"):
    _hold_in_the_actor()
