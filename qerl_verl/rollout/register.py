"""Registers the rollout replica and the transport of adapters when verl imports its registries."""


def register_replica(replica_module=None) -> None:
    """Registers the replica under verl's name ``vllm``. A second call changes nothing.

    The name is the same because verl branches on it in many places.

    Args:
        replica_module: the module ``verl.workers.rollout.replica``, passed by wrapt's post-import
            hook.
    """
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register("vllm", _load)


def _load():
    from qerl_verl.rollout.server import QeRLReplica

    return QeRLReplica


def register_sender(rollout_module=None) -> None:
    """Registers QeRL's sender of weights in verl's table of rollout classes. A second call changes
    nothing.

    Args:
        rollout_module: the module ``verl.workers.rollout.base``, passed by wrapt's post-import
            hook.
    """
    from verl.workers.rollout import base

    base._ROLLOUT_REGISTRY["vllm", "async"] = "qerl_verl.rollout.sender.QeRLServerAdapter"


def register_transport(checkpoint_engine_package=None) -> None:
    """Imports the module whose decorator registers the checkpoint engine ``qerl``. A second call
    changes nothing.

    Args:
        checkpoint_engine_package: the module ``verl.checkpoint_engine``, passed by wrapt's
            post-import hook.
    """
    import qerl_verl.rollout.transport  # noqa: F401
