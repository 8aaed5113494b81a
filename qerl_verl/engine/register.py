"""Put the engines into verl's registry, under our vendor name. Called when verl imports ``verl.workers.engine``."""


def register_engines(engine_package=None) -> None:
    """Register actor and critic for every backend name that the switch accepts and both devices. Idempotent.

    Args:
        engine_package: the module ``verl.workers.engine`` (wrapt's post-import hook passes it).
    """
    from verl.workers.engine.base import EngineRegistry

    from qerl_verl.engine.fsdp import NVFP4EngineWithLMHead, NVFP4EngineWithValueHead
    from qerl_verl.switch import ENGINE_VENDOR

    for model_type, engine in (("language_model", NVFP4EngineWithLMHead), ("value_model", NVFP4EngineWithValueHead)):
        registered = EngineRegistry._engines.get(model_type, {}).get("fsdp2", {})
        if ("cuda", ENGINE_VENDOR) not in registered:
            EngineRegistry.register(model_type, ["fsdp2"], device=["cuda", "cpu"], vendor=ENGINE_VENDOR)(engine)
