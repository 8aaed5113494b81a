"""Runs an engine for each checkpoint, one after the other, inside this process.

Usage: families_process.py OUT JSON_PROMPTS JSON_NOISE CHECKPOINT ADAPTER [CHECKPOINT ADAPTER ...]

A vLLM engine in a process of its own takes about ten seconds to start. One inside a process that
has imported vLLM and does not compile takes less than one. The observations go to OUT as JSON, by
checkpoint.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from qerl_verl.job import Job

os.environ |= Job().environment() | {
    "VERL_PLATFORM": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a function is sent to the worker
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles its sampling, also with enforce_eager
}

from transformers import AutoConfig  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402

from qerl_verl.rollout.overrides import hf_overrides  # noqa: E402
from qerl_verl.rollout.probes import norm_weights  # noqa: E402

LORA = {"rank": 4, "alpha": 8, "experts": True}


def log_probabilities(engine, prompts):
    """Returns the log-probabilities of all prompt tokens but the first."""
    engine.reset_prefix_cache()
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return [
        [place[token].logprob for token, place in zip(p[1:], output.prompt_logprobs[1:], strict=True)]
        for p, output in zip(prompts, outputs, strict=True)
    ]


def chosen_experts(engine, prompts):
    """Returns what the engine reports of its routing: tokens, but for the last, and their experts
    ``[tokens, layers, k]``."""
    engine.reset_prefix_cache()
    parameters = SamplingParams(max_tokens=3, temperature=0, detokenize=False, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    return [
        ([*prompt, *completion.token_ids[:-1]], completion.routed_experts.tolist())
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def adapter_shapes(worker):
    """Returns layer -> the rows at which its projections end."""
    modules = worker.model_runner.get_model().named_modules()
    return {name: list(module.qerl_adapter.ends) for name, module in modules if hasattr(module, "qerl_adapter")}


def with_images(engine, adapter):
    """Returns log-probabilities of :func:`image_prompts` without and with an adapter, and vLLM's
    tokens.
    """
    from tests.helpers.tiny_vision import image_prompts

    prompts = [{"prompt_token_ids": ids, "multi_modal_data": {"image": image}} for ids, image in image_prompts()]
    seen = {}
    parameters = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, ignore_eos=True)
    for key, load in (("image_clean", False), ("image_adapted", True)):
        if load:
            engine.collective_rpc("qerl_load_adapter_folder", args=(adapter,))
        engine.reset_prefix_cache()
        outputs = engine.generate(prompts, parameters, use_tqdm=False)
        seen["image_tokens"] = [output.prompt_token_ids for output in outputs]
        seen[key] = [
            [place[token].logprob for token, place in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:], strict=True)]
            for o in outputs
        ]
    return seen


def takes_images(checkpoint):
    return (Path(checkpoint) / "processor_config.json").exists()


def routes(checkpoint):
    return hasattr(AutoConfig.from_pretrained(checkpoint), "num_experts")


def start_engine(checkpoint, dtype, **options):
    """Starts an engine inside this process; ``options`` are further options of vLLM."""
    images = takes_images(checkpoint)
    return LLM(
        checkpoint,
        skip_tokenizer_init=not images,  # vLLM's processors of images need it
        **({"limit_mm_per_prompt": {"image": 1, "video": 0}} if images else {}),
        enable_return_routed_experts=routes(checkpoint),
        enforce_eager=True,
        distributed_executor_backend="uni",
        dtype=dtype,
        max_model_len=128,
        hf_overrides=hf_overrides(AutoConfig.from_pretrained(checkpoint), on_cpu=True),
        worker_extension_cls="qerl_verl.rollout.worker.QeRLWorkerExtension",
        additional_config={"qerl": {"kernel": "auto", "lora": LORA, "noise": True}},
        **options,
    )


def look_at(checkpoint, adapter, prompts, noise):
    images = takes_images(checkpoint)
    # bfloat16's rounding would hide what a family does differently
    engine = start_engine(checkpoint, "float32")
    seen = {"clean": log_probabilities(engine, prompts)}
    (seen["layers"],) = engine.collective_rpc(adapter_shapes)
    (seen["taken"],) = engine.collective_rpc("qerl_load_adapter_folder", args=(adapter,))
    seen["adapted"] = log_probabilities(engine, prompts)
    engine.collective_rpc("qerl_load_adapter", args=({}, LORA["alpha"] / LORA["rank"]))
    (seen["measured"],) = engine.collective_rpc("qerl_set_noise", kwargs=noise)
    (seen["norms"],) = engine.collective_rpc(norm_weights)
    seen["noised"] = log_probabilities(engine, prompts)
    engine.collective_rpc("qerl_set_noise", kwargs=noise | {"sigma": 0.0})
    seen["clean_again"] = log_probabilities(engine, prompts)
    if images:
        seen |= with_images(engine, adapter)
    if routes(checkpoint):
        seen["chosen"] = chosen_experts(engine, prompts)
    engine.llm_engine.engine_core.shutdown()
    return seen


if __name__ == "__main__":
    out, prompts, noise, *folders = sys.argv[1:]
    prompts, noise, found = json.loads(prompts), json.loads(noise), {}
    for checkpoint, adapter in zip(folders[::2], folders[1::2], strict=True):
        try:
            found[checkpoint] = look_at(checkpoint, adapter, prompts, noise)
        except Exception:
            found[checkpoint] = {"error": traceback.format_exc()}
    with open(out, "w") as file:
        json.dump(found, file)
