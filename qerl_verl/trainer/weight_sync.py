"""verl's weight syncs with the noise behind them, watching over the rollout's engines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures

import ray
from verl.checkpoint_engine import CheckpointEngineManager
from verl.utils.ray_utils import auto_await

ENGINE_CHECK_SECONDS = 5.0
"""Interval at which a running weight sync checks that the rollout engines are alive."""


def _check_engines(replicas: list) -> None:
    """Checks the replicas' engines.

    Raises:
        EngineDeadError: of vLLM; the engine of a replica has ended.
    """
    ray.get([replica.server_handle.qerl_check_engine.remote() for replica in replicas])


class NoisyCheckpointManager:
    """Wraps verl's CheckpointEngineManager: every weight sync ends with the noise of the next step.

    For engines that share the actor's GPU. All other calls are forwarded. The noise is set here and
    not in ``on_step_end``, so that it is in place before a trainer of any mode resumes generation.

    Args:
        after_sync: called with the replicas and the sync's ``global_steps``.
    """

    def __init__(self, manager: CheckpointEngineManager, after_sync: Callable[[list, int | None], None]):
        self._manager = manager
        self._after_sync = after_sync

    def __getattr__(self, name):
        return getattr(self._manager, name)

    def update_weights(self, global_steps: int | None = None):
        """Runs verl's weight sync while checking the engines.

        The actor waits without limit for the engine's worker to take a bucket
        (vllm_rollout/bucketed_weight_transfer.py, async_send_weights). Without the check, the job
        would hang when the worker dies.
        """
        manager = self._manager
        pending = manager.actor_wg.update_weights(global_steps=global_steps, mode=manager.backend)
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=ENGINE_CHECK_SECONDS)
            ray.get(done)
            if pending:
                _check_engines(manager.replicas)
        self._after_sync(manager.replicas, global_steps)
        return {}


class StandaloneCheckpointManager(CheckpointEngineManager):
    """Sets the noise in weight syncs to engines with GPUs of their own. verl's sync ends with
    resuming their generation, so the noise is set right before.

    Args:
        manager: verl's, which this one replaces.
    """

    def __init__(self, manager: CheckpointEngineManager, after_sync: Callable[[list, int | None], None]):
        super().__init__(config=manager.config, actor_wg=manager.actor_wg, replicas=manager.replicas)
        self._after_sync = after_sync
        self._global_steps: int | None = None

    def update_weights(self, global_steps: int | None = None) -> dict:
        """Runs verl's weight sync in a thread while checking the engines. When an engine has died,
        the thread is abandoned, since the job ends.
        """
        self._global_steps = global_steps
        sync, result = super().update_weights, futures.Future()

        def run() -> None:
            try:
                result.set_result(sync(global_steps))
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name="weight sync", daemon=True).start()
        while not futures.wait([result], ENGINE_CHECK_SECONDS).done:
            _check_engines(self.replicas)
        return result.result()

    @auto_await
    async def resume_generation_replicas(self):
        self._after_sync(self.replicas, self._global_steps)
        await super().resume_generation_replicas()
