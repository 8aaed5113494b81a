"""Runs verl's vLLM server for a rollout whose layers hold the adapter.

Such a server has no LoRA requests, and can sleep at either level. It is registered under verl's
name ``vllm`` through the RolloutReplicaRegistry, in QeRL's jobs only. A server whose engine has no
adapter of QeRL (vLLM's own LoRA path, a reward model) behaves as verl's.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import os
import secrets
import sys
from contextlib import AbstractContextManager, nullcontext

import ray
from verl.workers.rollout.replica import RolloutMode
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica
from vllm.platforms import current_platform

from qerl_verl.config.base import ENGINE
from qerl_verl.config.checks.plugins import vllm_policy_problem
from qerl_verl.job import JobError, RolloutLayers, find_job
from qerl_verl.rollout.ahead import ServerClass
from qerl_verl.rollout.compile_cache import compile_cache
from qerl_verl.rollout.overrides import hf_overrides
from qerl_verl.rollout.sender import job_name

ENGINE_LOOK_SECONDS = 5.0
"""Interval at which a server checks its engine. It is also the time that the server stays after the
engine's end, so that verl can end the run with vLLM's own error."""


class QeRLHttpServer(vLLMHttpServer):
    """One server of a rollout replica (verl/workers/rollout/vllm_rollout/vllm_async_server.py)."""

    _begun: asyncio.Event | None = None
    """Set when the constructor has run, in a process that was started ahead (rollout/ahead.py)."""
    _problem: Exception | None = None

    def __init__(self, *args, **kwargs):
        if not args and not kwargs:  # started ahead: qerl_begin runs the constructor
            self._begun = asyncio.Event()
            return
        super().__init__(*args, **kwargs)
        # verl names the socket of the engine's workers by it
        os.environ["VERL_RAY_JOB_ID"] = job_name()

    async def qerl_begin(self, arguments: dict) -> None:
        """Runs the constructor in a process that was started ahead.

        Nobody waits for this call, and Ray may deliver it after later calls with smaller arguments.
        :meth:`get_master_address` therefore waits for it and raises its error.
        """
        begun = self._begun
        assert begun is not None, "the process was not started ahead"
        try:
            type(self).__init__(self, **arguments)
        except Exception as error:
            self._problem = error
        finally:
            begun.set()

    async def qerl_refuse(self, error: Exception) -> None:
        """Reports that :meth:`qerl_begin` cannot be called, for example without its arguments."""
        self._problem = error
        if self._begun is not None:
            self._begun.set()

    async def get_master_address(self):
        """Returns verl's address, which verl reads before anything else.

        Raises:
            Exception: the error of the constructor.
        """
        if self._begun is not None:
            await self._begun.wait()
        if self._problem is not None:
            raise self._problem
        return super().get_master_address()

    def _layers(self) -> RolloutLayers | None:
        """Returns how QeRL's engine computes, or None for an engine that is not the rollout's."""
        engine = (self.config.get("engine_kwargs", {}) or {}).get("vllm", {}) or {}
        return RolloutLayers.of_engine(engine.get("additional_config"))

    def _init_model_config(self, model_config):
        """Removes the rank from the model's configuration where the layers hold the adapter.

        verl starts vLLM with its LoRA path when the model has a rank.

        Raises:
            RuntimeError: on this node, vLLM would not load QeRL's plugin and would serve its own
                layers.
            JobError: the engine's settings are not those of the run.
        """
        layers, job, problem = self._layers(), find_job(), vllm_policy_problem(os.environ)
        if layers and job and layers != job.layers:
            raise JobError(
                f"[qerl] {ENGINE}.additional_config.qerl is {layers}, and the run's settings say "
                f"{job.layers}; remove what changes it"
            )
        if problem and layers:
            raise RuntimeError(f"[qerl] on {ray.util.get_node_ip_address()}: {problem}")
        model_config = super()._init_model_config(model_config)
        if layers is None or layers.lora is None:
            return model_config
        model_config = copy.copy(model_config)
        for name, value in (("lora_rank", 0), ("lora", {})):
            # verl's fields are frozen, and replace() would load everything again
            object.__setattr__(model_config, name, value)
        return model_config

    def _apply_quantization(self):
        """Adds the settings of :mod:`qerl_verl.rollout.overrides` to verl's ``hf_overrides``."""
        quantization, overrides = super()._apply_quantization()
        if self._layers():
            overrides |= hf_overrides(self.model_config.hf_config, current_platform.is_cpu())
        return quantization, overrides

    async def run_server(self, args: argparse.Namespace):
        """Starts verl's HTTP server with a random API key.

        Its endpoints listen on the node's address. Without a key, anyone who reaches them could
        sample and load adapters (``/v1/load_lora_adapter``). verl's own agent loops call the server
        through Ray. A user who needs the endpoints sets ``VLLM_API_KEY`` in
        ``ray_kwargs.ray_init.runtime_env.env_vars`` and sends that key.
        """
        if self._layers() and not (args.api_key or os.environ.get("VLLM_API_KEY")):
            args.api_key = [secrets.token_hex(32)]
        with self._compile_cache():
            await super().run_server(args)
        self._engine_watch = asyncio.create_task(self._end_with_engine())

    def _compile_cache(self) -> AbstractContextManager:
        """Returns a context in which the engine starts, with vLLM's cache of compiled graphs where
        ``qerl.rollout.compile_cache`` asks for it and the engine compiles."""
        job = find_job()
        wanted = job and job.settings.rollout.compile_cache and self._layers()
        if not wanted or self.config.get("enforce_eager"):
            return nullcontext()
        return compile_cache(f"replica_{self.replica_rank}_{self.node_rank}")

    async def _end_with_engine(self) -> None:
        """Ends this process after its engine, as verl's servers without HTTP do (``run_headless``).

        Each request to a dead engine fails at once, and verl's asynchronous trainers replace what
        fails by new prompts (verl/trainer/ppo/v1/replay_buffer.py, ``wait_for_sampleable``), so
        they would go on without end. The driver sees the end of the actor
        (platform/lost_processes.py).
        """
        while not self.engine.errored:
            await asyncio.sleep(ENGINE_LOOK_SECONDS)
        print(
            f"[qerl] vLLM's engine of this server (process {os.getpid()}) has ended: its "
            "EngineCore or one of its workers was killed or failed; the lines above say why, or "
            "`dmesg` where the kernel was short of memory",
            file=sys.stderr,
            flush=True,
        )
        await asyncio.sleep(ENGINE_LOOK_SECONDS)
        os._exit(1)

    def _resolve_sleep_level(self) -> int:
        """Returns ``qerl.rollout.sleep_level``.

        Level 1 keeps the packed base in host memory; level 2 drops it and reads it from disk again.
        A base that the actor owns stays in place at either level; the remaining norms and adapter
        are small and wait on the host.
        """
        if (job := find_job()) and job.sharing:
            return 1
        layers = self._layers()
        return layers.sleep_level if layers else super()._resolve_sleep_level()

    async def wake_up(self, tags: list[str] | None = None):
        """Wakes the engine, and at level 2 loads the base again.

        The memory comes back empty at that level. The adapter follows with the weight sync.
        """
        await super().wake_up(tags)
        # the others never sleep at level 2
        sleeps = self.node_rank == 0 and self.rollout_mode == RolloutMode.HYBRID
        if sleeps and self._layers() and self._resolve_sleep_level() == 2:
            if "weights" in (tags or self._get_wake_up_tags()):
                await self.engine.collective_rpc("qerl_reload_base")

    async def release_kv_cache(self):
        """Releases nothing.

        verl would put the whole engine to sleep to make room for the weights of a sync
        (vllm_async_server.py, release_kv_cache). An adapter needs no room, and at level 2 the sleep
        would also lose the base.
        """
        if not self._layers():
            await super().release_kv_cache()

    async def resume_kv_cache(self):
        """Resumes nothing, because nothing was released.

        verl has dropped the prefixes that were cached under the previous weights (vllm_rollout.py,
        update_weights).
        """
        if not self._layers():
            await super().resume_kv_cache()

    async def qerl_set_noise(self, **arguments) -> list[dict[str, float]]:
        """Calls :meth:`qerl_verl.rollout.worker.QeRLWorkerExtension.qerl_set_noise` in each worker.

        verl's ``collective_rpc`` returns nothing, so it cannot be used here.

        Returns:
            The measured noise of each worker.
        """
        return await self.engine.collective_rpc("qerl_set_noise", kwargs=arguments)

    async def qerl_check_engine(self) -> None:
        """Checks that the engine's process and its workers are alive.

        Raises:
            EngineDeadError: one of them has ended (vLLM's error).
        """
        if self.node_rank == 0 and self.engine.errored:
            raise self.engine.dead_error


class QeRLReplica(vLLMReplica):
    """A rollout replica of :class:`QeRLHttpServer`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.server_class = ServerClass(ray.remote(QeRLHttpServer))
