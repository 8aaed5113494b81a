"""Starts the processes of the rollout's servers while the actor is being built.

verl starts them after the actor, and each first imports vLLM, which takes as long as building a
small actor. Only the import happens ahead. verl's constructor of the server runs when verl calls
it, with verl's arguments, so the server sees the same actor and the same GPU.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray
from omegaconf import DictConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from qerl_verl.log_lines import say

logger = logging.getLogger(__name__)


class ServersAhead:
    """The servers of this job's rollout by name, started in a thread of the trainer's process.

    This happens only on one node, where the node of a server is known before the actor's workers
    are placed. verl starts all other servers as usual.
    """

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._servers: dict[str, tuple[dict, Any]] = {}

    def start(self, config: DictConfig) -> None:
        """Starts the imports and returns at once.

        Args:
            config: the trainer's configuration.
        """
        self._thread = threading.Thread(target=self._run, args=(config,), name="qerl servers", daemon=True)
        self._thread.start()

    def _run(self, config: DictConfig) -> None:
        try:
            _start_all(config, self._servers)
        except Exception:  # verl then starts the servers itself
            logger.warning("[qerl] the rollout's servers were not started ahead", exc_info=True)
        else:
            if self._servers:
                say(f"start: rollout servers that start beside the actor: {len(self._servers)}")

    def take(self, name: str | None, node: str | None, environment: dict[str, str]) -> Any:
        """Returns the server of a name, once.

        The result is None if there is no server for that node and environment. A server that was
        started for others is ended, because Ray gives a name to one actor only.
        """
        if self._thread is not None:
            self._thread.join()
        if name is None or name not in self._servers:
            return None
        started, server = self._servers.pop(name)
        if started == {"node": node, "environment": environment}:
            return server
        logger.warning("[qerl] %s was started for %s and is wanted on %s with %s", name, started, node, environment)
        ray.kill(server)
        return None


AHEAD = ServersAhead()
"""The servers of this process."""


def _start_all(config: DictConfig, started: dict[str, tuple[dict, Any]]) -> None:
    """Starts the servers. Each is added to ``started`` at once, because its name is taken then."""
    from verl.plugin.platform import get_platform

    from qerl_verl.rollout.server import QeRLHttpServer, QeRLReplica

    rollout, nodes = config.actor_rollout_ref.rollout, [node for node in ray.nodes() if node["Alive"]]
    if rollout.name != "vllm" or rollout.disaggregation.enabled or len(nodes) != 1:
        return
    model, gpus = config.actor_rollout_ref.model, config.trainer.n_gpus_per_node * config.trainer.nnodes
    first = QeRLReplica(0, rollout, model, rollout.n_gpus_per_node)
    if first.nnodes != 1:
        return
    platform, node = get_platform(), nodes[0]["NodeID"]
    environment = {**{name: "1" for name in platform.ray_noset_envvars()}, **platform.rollout_env_vars()}
    for rank in range(gpus // first.world_size):
        name = f"{first._get_server_name_prefix()}server_{rank}_0"
        server = ray.remote(QeRLHttpServer).options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
            runtime_env={"env_vars": environment},
            name=name,
            max_concurrency=first.max_concurrency,
        )
        started[name] = ({"node": node, "environment": environment}, server.remote())


class ServerClass:
    """Replaces verl's ``ray.remote(vLLMHttpServer)``, and uses a server that was started ahead.

    Args:
        remote: ``ray.remote`` of the server's class.
        ahead: the servers that were started ahead.
    """

    def __init__(self, remote: Any, ahead: ServersAhead = AHEAD):
        self._remote = remote
        self._ahead = ahead

    def options(self, **options) -> _Choice:
        """Works like Ray's ``options``."""
        return _Choice(self._ahead, options, self._remote.options(**options).remote)

    def __getattr__(self, name):
        return getattr(self._remote, name)


class _Choice:
    """Stands for the result of Ray's ``options``."""

    def __init__(self, ahead: ServersAhead, options: dict, create: Callable):
        self._ahead = ahead
        self._options = options
        self._create = create

    def remote(self, **arguments):
        options = self._options
        node = getattr(options.get("scheduling_strategy"), "node_id", None)
        environment = (options.get("runtime_env") or {}).get("env_vars") or {}
        server = self._ahead.take(options.get("name"), node, environment)
        if server is None:
            return self._create(**arguments)
        server.qerl_begin.remote(arguments).future().add_done_callback(functools.partial(_pass_on, server))
        return server


def _pass_on(server: Any, begun: Future) -> None:
    """Tells a server that waits for its arguments that they will not arrive."""
    if error := begun.exception():
        server.qerl_refuse.remote(error)
