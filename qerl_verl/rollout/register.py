"""Put the rollout replica and the transport of adapters into verl's registries. Called when verl
imports those."""


def register_replica(replica_module=None) -> None:
    """Takes over verl's name ``vllm``: verl branches on it in many places. Idempotent.

    Args:
        replica_module: the module ``verl.workers.rollout.replica`` (wrapt's post-import hook passes
            it).
    """
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register("vllm", _load)


def _load():
    from qerl_verl.rollout.server import QeRLReplica

    return QeRLReplica


def register_sender(rollout_module=None) -> None:
    """Puts our sender of weights into verl's table of rollout classes. Idempotent.

    Args:
        rollout_module: the module ``verl.workers.rollout.base`` (wrapt's post-import hook passes
            it).
    """
    from verl.workers.rollout import base

    base._ROLLOUT_REGISTRY["vllm", "async"] = "qerl_verl.rollout.sender.QeRLServerAdapter"


def register_transport(checkpoint_engine_package=None) -> None:
    """Imports the module whose decorator registers the checkpoint engine ``qerl``. Idempotent.

    Args:
        checkpoint_engine_package: the module ``verl.checkpoint_engine`` (wrapt's post-import hook
            passes it).
    """
    import qerl_verl.rollout.transport  # noqa: F401
