"""Runs two engines of a model with delta nets inside this process, one after the other.

Usage: delta_nets_process.py OUT JSON_PROMPTS JSON_NOISE PACKED ADAPTER PLAIN ADAPTED NOISED

The engine of PACKED has this package's layers. PLAIN, ADAPTED and NOISED are 16-bit checkpoints
with the same weights, the adapter added, and the noise added, for vLLM's own engine. The
observations go to OUT as JSON.
"""

import json
import sys
import traceback

from tests.rollout.families_process import LORA, adapter_shapes, log_probabilities, start_engine

from vllm import LLM  # isort: skip

from qerl_verl.rollout.probes import norm_weights

STATES = {"mamba_ssm_cache_dtype": "float32"}


def look_at_packed(packed, adapter, prompts, noise):
    engine = start_engine(packed, "bfloat16", **STATES)
    seen = {"clean": log_probabilities(engine, prompts)}
    (seen["layers"],) = engine.collective_rpc(adapter_shapes)
    (seen["taken"],) = engine.collective_rpc("qerl_load_adapter_folder", args=(adapter,))
    seen["adapted"] = log_probabilities(engine, prompts)
    engine.collective_rpc("qerl_load_adapter", args=({}, LORA["alpha"] / LORA["rank"]))
    engine.collective_rpc("qerl_set_noise", kwargs=noise)
    (seen["norms"],) = engine.collective_rpc(norm_weights)
    seen["noised"] = log_probabilities(engine, prompts)
    engine.collective_rpc("qerl_set_noise", kwargs=noise | {"sigma": 0.0})
    seen["clean_again"] = log_probabilities(engine, prompts)
    engine.llm_engine.engine_core.shutdown()
    return seen


def look_at_plain(folder, prompts):
    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        distributed_executor_backend="uni",
        dtype="bfloat16",
        max_model_len=128,
        **STATES,
    )
    found = log_probabilities(engine, prompts)
    engine.llm_engine.engine_core.shutdown()
    return found


if __name__ == "__main__":
    out, prompts, noise, packed, adapter, *plain = sys.argv[1:]
    prompts, noise = json.loads(prompts), json.loads(noise)
    try:
        found = {"ours": look_at_packed(packed, adapter, prompts, noise)}
        found["vllm"] = {
            name: look_at_plain(folder, prompts)
            for name, folder in zip(("clean", "adapted", "noised"), plain, strict=True)
        }
    except Exception:
        found = {"error": traceback.format_exc()}
    with open(out, "w") as file:
        json.dump(found, file)
