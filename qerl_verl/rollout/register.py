"""Put the rollout replica into verl's registry. Called when verl imports ``verl.workers.rollout.replica``."""


def register_replica(replica_module=None) -> None:
    """Take over verl's name ``vllm``: verl branches on it in many places. Idempotent.

    Args:
        replica_module: the module ``verl.workers.rollout.replica`` (wrapt's post-import hook passes it).
    """
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register("vllm", _load)


def _load():
    from qerl_verl.rollout.server import QeRLReplica

    return QeRLReplica
