"""Names the lost node when a run ends because a node of the Ray cluster is gone.

verl's driver shows whichever error came first: an actor that died, or a rank whose peer closed the
connection. Ray detects the loss of the node later, so for errors of this kind the report waits for
Ray.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

DETECTION_SECONDS = 90.0
"""How long Ray may take to declare a node dead (``health_check_*`` of ray_config_def.h: about a
minute)."""

_LOST_CONNECTION = re.compile(
    r"gloo|nccl|connection|broken pipe|timed out|unreachable|actor ?died|actor is dead|node.* died|unavailable|disconnect",
    re.IGNORECASE,
)


@dataclass
class NodeWatch:
    """Compares the nodes of the cluster with those that a run began with.

    Attributes:
        list_nodes: Ray's list of nodes (``ray.nodes``).
        began_with: ids of the first nodes; empty until Ray has started.
    """

    list_nodes: Callable[[], list[dict]]
    began_with: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Records the nodes; called when Ray has started."""
        self.began_with = {node["NodeID"] for node in self.list_nodes() if node["Alive"]}

    def lost(self) -> list[str]:
        """Returns the lost nodes with Ray's reason: ``node2 (10.0.0.2): health check failed``."""
        gone = [n for n in self.list_nodes() if not n["Alive"] and n["NodeID"] in self.began_with]
        return [_describe(node) for node in gone]

    def find_lost(self, error: BaseException, say: Callable[[str], None]) -> list[str]:
        """Returns :meth:`lost`. Waits for Ray's detection if ``error`` may result from a lost node
        and the run has several nodes.

        Args:
            error: the error that ended the run.
            say: called with one line for the user.
        """
        lost = self.lost()
        if lost or len(self.began_with) < 2 or not _LOST_CONNECTION.search(f"{type(error).__name__}: {error}"):
            return lost
        say(f"a connection was lost; asking Ray for up to {DETECTION_SECONDS:.0f} s whether a node is gone")
        end = time.monotonic() + DETECTION_SECONDS
        while not (lost := self.lost()) and time.monotonic() < end:
            time.sleep(1.0)
        return lost


def watch_nodes() -> NodeWatch | None:
    """Returns a watch that begins when this process has started or joined Ray; None if this version
    of Ray calls no hooks after ``ray.init`` (ray/_private/worker.py, ``_post_init_hooks``).
    """
    import ray
    from ray._private import worker

    hooks = getattr(worker, "_post_init_hooks", None)
    if not isinstance(hooks, list):
        return None
    watch = NodeWatch(ray.nodes)
    hooks.append(watch.begin)
    return watch


def _describe(node: dict) -> str:
    name, address = node.get("NodeManagerHostname") or node.get("NodeName"), node["NodeManagerAddress"]
    reason = " ".join(str(node.get("DeathReasonMessage") or "Ray gives no reason").split())
    return f"{name} ({address}): {reason}"
