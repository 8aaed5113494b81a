"""Registers the trainers with verl, when verl imports ``verl.trainer.ppo.v1``."""


def register_trainers(trainer_package=None) -> None:
    """Imports the module whose decorators register ``qerl_sync`` and the asynchronous ones.
    A second call changes nothing."""
    import qerl_verl.trainer.ppo  # noqa: F401
