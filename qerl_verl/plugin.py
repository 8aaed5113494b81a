"""Registers QeRL with verl (group ``verl.plugins``) and vLLM (group ``vllm.general_plugins``).

In the process that composes the configuration, the import makes Hydra find the group ``qerl``. In a
job that runs with the switch (the driver has set ``QERL_JOB`` in Ray's runtime environment), it
registers the CPU platform, the training engines and the trainers, each when verl imports the
registry that it belongs to. In any other process it does nothing.

verl logs a plugin's exceptions at DEBUG and continues (``verl/__init__.py``), which would turn a
broken installation into a run without QeRL. A failure here therefore ends the process wherever QeRL
was requested.
"""

import sys

from qerl_verl.switch import running_arm, switched_on


def _is_ray_worker() -> bool:
    import ray

    return ray._private.worker.global_worker.mode == ray.WORKER_MODE


def register_search_path() -> None:
    """Makes Hydra find ``qerl_verl/config``, also in an editable installation."""
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    from qerl_verl.config.search_path import QeRLSearchPathPlugin

    plugins = Plugins.instance()
    if not any(p.__name__ == QeRLSearchPathPlugin.__name__ for p in plugins.discover(SearchPathPlugin)):
        plugins.register(QeRLSearchPathPlugin)


def register_platform() -> None:
    """Adds the platform ``cpu`` to verl.

    It is chosen only by ``VERL_PLATFORM=cpu``, never by detection.
    """
    from verl.plugin.platform.platform_manager import PlatformRegistry

    from qerl_verl.platform.cpu import PlatformCPU

    if PlatformRegistry.get("cpu") is None:
        PlatformRegistry.register(platform="cpu")(PlatformCPU)


def register_verl() -> None:
    """Registers platform, engines, trainers, rollout replica and transport.

    All but the platform are registered when verl first imports their registries.
    """
    import wrapt

    register_platform()
    wrapt.register_post_import_hook("qerl_verl.engine.register:register_engines", "verl.workers.engine")
    wrapt.register_post_import_hook("qerl_verl.trainer.register:register_trainers", "verl.trainer.ppo.v1")
    wrapt.register_post_import_hook("qerl_verl.rollout.register:register_replica", "verl.workers.rollout.replica")
    wrapt.register_post_import_hook("qerl_verl.rollout.register:register_sender", "verl.workers.rollout.base")
    wrapt.register_post_import_hook("qerl_verl.rollout.register:register_transport", "verl.checkpoint_engine")


def register_vllm() -> None:
    """Registers QeRL's layers with vLLM, in QeRL's jobs only.

    These are norms that take noise and, on an NVFP4 base, QeRL's method for ``compressed-tensors``
    NVFP4 weights.
    """
    if switched_on():
        from qerl_verl.evaluation.processes import stay_with_evaluation
        from qerl_verl.rollout.norm import register_norm

        register_norm()
        stay_with_evaluation()
    if running_arm() in ("nvfp4", "mxfp4"):
        from qerl_verl.rollout.quantization import register_quantization
        from qerl_verl.rollout.shared_base import register_shared_base

        register_quantization()
        register_shared_base()


def _load() -> None:
    if running_arm():
        register_verl()
    elif not _is_ray_worker():
        register_search_path()


try:
    _load()
except Exception as error:
    if switched_on() or any("qerl" in argument for argument in sys.argv[1:]):
        import traceback

        traceback.print_exc()
        raise SystemExit(
            "[qerl] the plugin qerl_verl could not be loaded, so the run would go on without "
            f"QeRL: {type(error).__name__}: {error}. `qerl doctor` checks the installation."
        ) from error
    raise
