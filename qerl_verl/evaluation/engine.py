"""Runs a vLLM engine with the layers of a run's rollout, and loads one adapter after another."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qerl_verl.config.rules import COMPILATION, WORKER_EXTENSION, cpu_environment
from qerl_verl.config.settings import QeRLSettings
from qerl_verl.evaluation.policies import Adapter, Model, write_plain
from qerl_verl.job import Job, LoraSettings, RolloutLayers
from qerl_verl.lora.experts import adapts_experts
from qerl_verl.platform.cpu_features import missing_bfloat16
from qerl_verl.rollout.overrides import hf_overrides
from qerl_verl.switch import ENGINE_VENDOR, EVALUATION_ENV

PATIENCE = 10.0
"""Seconds within which the engine must be idle after its last response."""


@dataclass(frozen=True)
class EngineSettings:
    """How vLLM runs. None leaves a value to vLLM.

    Attributes:
        dtype: dtype of activations and 16-bit weights. ``auto`` is bfloat16, or float32 on a CPU
            without bfloat16 arithmetic.
        kernel: kernel of the NVFP4 layers, as ``qerl.rollout.kernel``.
        lora: ``inline`` or ``punica``, as ``qerl.rollout.lora``. A 16-bit base always has vLLM's
            own path, punica.
        tensor_parallel_size: number of GPUs that share the model.
        gpu_memory_utilization: fraction of a GPU's memory.
        max_num_seqs: number of responses that are generated at the same time.
        enforce_eager: disables CUDA graphs and compilation.
    """

    dtype: str = "auto"
    kernel: str = "auto"
    lora: str = "inline"
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float | None = None
    max_num_seqs: int | None = None
    enforce_eager: bool = False


@dataclass(frozen=True)
class Request:
    """A response to sample.

    Attributes:
        key: returned with the response.
        prompt: token ids.
        seed: seed of its sampling.
    """

    key: Any
    prompt: list[int]
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled."""

    temperature: float
    top_p: float
    max_tokens: int


def use_environment(form: Literal["nvfp4", "bf16"], on_cpu: bool) -> None:
    """Sets the environment variables of a job with the switch.

    vLLM's plugins read them in this process and in the processes that it starts.

    Args:
        form: ``nvfp4`` or ``bf16``, see :class:`~qerl_verl.evaluation.policies.Model`.
        on_cpu: whether vLLM runs on the CPU.
    """
    variables = {
        **Job(QeRLSettings(arm=form)).environment(),
        EVALUATION_ENV: str(os.getpid()),
        "VERL_ENGINE_VENDOR": ENGINE_VENDOR,
        "VERL_RAY_JOB_ID": str(os.getpid()),  # part of the name of verl's socket
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if on_cpu:
        variables |= cpu_environment(os.environ, lambda line: print(f"qerl: {line}", file=sys.stderr))
    os.environ.update(variables)


def compute_dtype(dtype: str, on_cpu: bool) -> str:
    """Resolves ``auto`` as the switch does for actor and rollout."""
    if dtype != "auto":
        return dtype
    return "float32" if on_cpu and missing_bfloat16() else "bfloat16"


class Engine:
    """Starts vLLM on a model.

    Args:
        model: the model to serve.
        adapters: all adapters that will be used. Their largest rank decides the size of the
            buffers.
        longest: largest number of tokens of prompt and response together.
        settings: how vLLM runs.
        on_cpu: whether vLLM runs on the CPU.
    """

    def __init__(self, model: Model, adapters: list[Adapter], longest: int, settings: EngineSettings, on_cpu: bool):
        use_environment(model.form, on_cpu)
        from vllm import LLM

        self._model = model
        self._inline = model.form == "nvfp4" and settings.lora == "inline"
        self._request = None  # vLLM's LoRARequest of the current adapter
        arguments = self._arguments(adapters, settings, on_cpu)
        self._llm = LLM(str(model.folder), max_model_len=longest, **arguments)
        self._engine = self._llm.llm_engine
        self._folder: tempfile.TemporaryDirectory | None = None  # holds the current adapter
        self._used, self._counter = 0, 0
        vocabulary = len(self._engine.get_tokenizer())
        # as in verl: padding rows of the embeddings are never sampled
        self._engine.collective_rpc("monkey_patch_model", kwargs={"vocab_size": vocabulary})

    def _arguments(self, adapters: list[Adapter], settings: EngineSettings, on_cpu: bool) -> dict[str, Any]:
        from transformers import AutoConfig

        rank = max((adapter.rank for adapter in adapters), default=0)
        lora = None
        if self._inline and rank:
            # The scaling is part of the layer. An adapter with another scaling is multiplied when
            # it is loaded.
            experts = any(adapts_experts(adapter.config["target_modules"]) for adapter in adapters)
            lora = LoraSettings(rank, adapters[0].scaling * rank, experts)
        compilation: dict[str, Any] = {"cudagraph_mode": "FULL_AND_PIECEWISE"}  # as verl
        if self._model.form == "nvfp4":
            compilation |= json.loads(COMPILATION)
        arguments: dict[str, Any] = {
            "dtype": compute_dtype(settings.dtype, on_cpu),
            "tensor_parallel_size": settings.tensor_parallel_size,
            "enforce_eager": settings.enforce_eager or on_cpu,
            "worker_extension_cls": WORKER_EXTENSION,
            "additional_config": RolloutLayers(settings.kernel, lora).additional_config(),
            "seed": 0,
            "hf_overrides": hf_overrides(AutoConfig.from_pretrained(self._model.folder), on_cpu),
        }
        if not arguments["enforce_eager"]:
            arguments["compilation_config"] = compilation
        if rank and not self._inline:
            from verl.workers.rollout.vllm_rollout.utils import get_vllm_max_lora_rank

            arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": get_vllm_max_lora_rank(rank)}
        for name in ("gpu_memory_utilization", "max_num_seqs"):
            if (value := getattr(settings, name)) is not None:
                arguments[name] = value
        return arguments

    def use(self, adapter: Adapter | None) -> None:
        """Samples from the model with this adapter, or without one, from the next request on."""
        self._request = None
        if adapter is None:
            if self._inline and self._used:
                self._engine.collective_rpc("qerl_load_adapter", args=({}, 1.0))
        else:
            self._load(adapter)
        self._forget_prefixes()

    def _forget_prefixes(self) -> None:
        """Drops the prefixes that were cached under the previous weights.

        With asynchronous scheduling, the last step may still hold them for a moment.
        """
        until = time.monotonic() + PATIENCE
        while not self._engine.reset_prefix_cache():
            if time.monotonic() > until:
                raise RuntimeError("vLLM keeps the prefixes that it cached under another adapter")
            time.sleep(0.1)

    def _load(self, adapter: Adapter) -> None:
        self._used += 1
        before, self._folder = self._folder, tempfile.TemporaryDirectory(prefix="qerl-eval-")
        write_plain(adapter, self._model, Path(self._folder.name))
        if self._inline:
            self._engine.collective_rpc("qerl_load_adapter_folder", args=(self._folder.name,))
        else:
            from vllm.lora.request import LoRARequest

            self._request = LoRARequest(f"qerl-{self._used}", self._used, self._folder.name)
            self._engine.add_lora(self._request)
        if before is not None:
            before.cleanup()

    def generate(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[tuple[Request, list[int], str]]:
        """Samples responses and yields each as soon as it is complete.

        Yields:
            The request, the token ids of the response (with its end token), and vLLM's reason for
            its end.
        """
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        waiting, active = iter(requests), {}
        room = 2 * self._engine.vllm_config.scheduler_config.max_num_seqs
        try:
            while True:
                while len(active) < room and (request := next(waiting, None)) is not None:
                    self._counter += 1
                    parameters = SamplingParams(
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        max_tokens=sampling.max_tokens,
                        seed=request.seed,
                        detokenize=False,
                        output_kind=RequestOutputKind.FINAL_ONLY,
                    )
                    self._engine.add_request(
                        str(self._counter), tokens_input(request.prompt), parameters, lora_request=self._request
                    )
                    active[str(self._counter)] = request
                if not active:
                    return
                for output in self._engine.step():
                    if output.finished:
                        done = output.outputs[0]
                        yield active.pop(output.request_id), list(done.token_ids), str(done.finish_reason)
        except GeneratorExit:  # the caller stops early, while the engine stays in use
            self._engine.abort_request(list(active))
            raise

    def close(self) -> None:
        """Ends vLLM's processes."""
        self._engine.engine_core.shutdown()
        if self._folder is not None:
            self._folder.cleanup()
