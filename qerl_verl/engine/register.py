"""Registers the engines with verl under QeRL's vendor name, when verl imports
``verl.workers.engine``."""

from importlib import import_module

from qerl_verl.switch import ENGINE_VENDOR, running_arm

ENGINES = {
    "nvfp4": {
        "language_model": "qerl_verl.engine.nvfp4:NVFP4EngineWithLMHead",
        "value_model": "qerl_verl.engine.nvfp4_critic:NVFP4EngineWithValueHead",
    },
    "bf16": {"language_model": "qerl_verl.engine.bf16:BF16EngineWithLMHead"},
    "nf4": {"language_model": "qerl_verl.engine.nf4:NF4EngineWithLMHead"},
}
"""Arm -> verl's model type -> engine. MXFP4 is stored as NVFP4 and runs on its engines."""


def engine_class(arm: str | None, model_type: str) -> type | None:
    """Returns the engine of an arm for one of verl's model types; None where the arm has none."""
    place = ENGINES["nvfp4" if arm == "mxfp4" else str(arm)].get(model_type)
    if place is None:
        return None
    module, name = place.split(":")
    return getattr(import_module(module), name)


def register_engines(engine_package=None) -> None:
    """Registers the arm's actor and critic for every backend name that the switch accepts and both
    devices. A second call changes nothing.

    Args:
        engine_package: the module ``verl.workers.engine`` (wrapt's post-import hook passes it).
    """
    from verl.workers.engine.base import EngineRegistry

    from qerl_verl.engine.attention import register_attention

    register_attention()
    for model_type in ("language_model", "value_model"):
        registered = EngineRegistry._engines.get(model_type, {}).get("fsdp2", {})
        engine = engine_class(running_arm(), model_type)
        if engine is not None and ("cuda", ENGINE_VENDOR) not in registered:
            EngineRegistry.register(model_type, ["fsdp2"], device=["cuda", "cpu"], vendor=ENGINE_VENDOR)(engine)
