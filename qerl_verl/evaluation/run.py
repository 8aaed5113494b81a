"""Runs an evaluation from its settings to its results."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

import qerl_verl
from qerl_verl.config.checks.models import cpu_head_size_problem
from qerl_verl.evaluation import engine as engines
from qerl_verl.evaluation.engine import Engine, EngineSettings, Request, Sampling
from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.evaluation.policies import BASE, Adapter, Model, check_adapters, check_bases, find_model
from qerl_verl.evaluation.problems import DataSet, Problem, read_data
from qerl_verl.evaluation.report import Result, as_json, summarize
from qerl_verl.evaluation.responses import Response, ResponseFile
from qerl_verl.evaluation.rewards import Reward
from qerl_verl.json_files import write_json_atomically
from qerl_verl.nvfp4.cache import Quantization, fetch_model
from qerl_verl.nvfp4.errors import CheckpointError

ResponseKey = tuple[str, str, int, int]


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate, and how.

    The defaults of sampling are those of the paper (arXiv 2510.11696, appendix E).

    Attributes:
        model: a folder, or a name on the Hugging Face hub.
        data: one or more data sets, see :func:`~qerl_verl.evaluation.problems.read_data`.
        responses: the file of responses.
        adapters: folders, see :func:`~qerl_verl.evaluation.policies.expand`.
        with_base: also evaluate the model without an adapter. Without adapters this is the only
            policy.
        other_base: allow adapters that were trained on other weights.
        samples: number of responses to each problem.
        ks: each k of pass@k.
        temperature: temperature of sampling; 0 is greedy.
        top_p: top-p of sampling.
        max_tokens: largest number of tokens of a response.
        seed: seed from which each problem and sample derives its own.
        limit: number of problems to take from the beginning of each data set.
        reward_function: see :class:`~qerl_verl.evaluation.rewards.Reward`.
        correct_from: the smallest score of a right response.
        confidence: level of the intervals.
        prompt_key: verl's ``data.prompt_key``.
        chat_template: text that replaces the tokenizer's (verl's ``model.custom_chat_template``).
        chat_template_arguments: verl's ``data.apply_chat_template_kwargs``.
        quantization: how a 16- or 32-bit model is quantized first; None uses it as it is.
        cache_dir: cache of quantized checkpoints.
        engine: how vLLM runs.
    """

    model: str
    data: Sequence[str]
    responses: Path
    adapters: Sequence[str] = ()
    with_base: bool = False
    other_base: bool = False
    samples: int = 1
    ks: Sequence[int] = (1,)
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 4096
    seed: int = 0
    limit: int | None = None
    reward_function: str | None = None
    correct_from: float = 1.0
    confidence: float = 0.95
    prompt_key: str = "prompt"
    chat_template: str | None = None
    chat_template_arguments: dict[str, Any] = field(default_factory=dict)
    quantization: Quantization | None = None
    cache_dir: Path | None = None
    engine: EngineSettings = EngineSettings()


@dataclass(frozen=True)
class Plan:
    """A checked evaluation, ready to be sampled.

    Attributes:
        settings: the user's settings.
        model: the base.
        policies: name -> adapter, or None for the model without one.
        data: the data sets.
        prompts: (data set, index) -> token ids.
        chat_template: the template of the prompts.
        reward: the reward of responses.
        on_cpu: whether vLLM runs on the CPU.
    """

    settings: EvaluationSettings
    model: Model
    policies: dict[str, Adapter | None]
    data: list[DataSet]
    prompts: dict[tuple[str, int], list[int]]
    chat_template: str
    reward: Reward
    on_cpu: bool

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt and its response."""
        return max(map(len, self.prompts.values())) + self.settings.max_tokens

    def identity(self) -> dict[str, Any]:
        """Returns argument -> value, for everything that decides what a response is."""
        settings = self.settings
        out = {
            "MODEL (fingerprint of its weights)": self.model.fingerprint,
            "--dtype": engines.compute_dtype(settings.engine.dtype, self.on_cpu),
            "--temperature": settings.temperature,
            "--top-p": settings.top_p,
            "--max-tokens": settings.max_tokens,
            "--seed": settings.seed,
            "--prompt-key": settings.prompt_key,
            "--chat-template (digest)": hashlib.sha256(self.chat_template.encode()).hexdigest()[:16],
            "--chat-template-args": settings.chat_template_arguments,
            "--reward-function (digest)": self.reward.digest,
        }
        out |= {f"--data {data.name} (digest)": data.digest for data in self.data}
        return out | {f"--adapter {name} (digest)": a.digest for name, a in self.policies.items() if a is not None}

    def wanted(self, policy: str) -> Iterator[tuple[ResponseKey, Problem]]:
        """Yields every response of a policy.

        Responses to one problem are adjacent, so that vLLM reuses the prompt.
        """
        for data in self.data:
            for problem in data.problems:
                for sample in range(self.settings.samples):
                    yield (policy, data.name, problem.index, sample), problem


def prepare(settings: EvaluationSettings) -> Plan:
    """Reads and checks everything that an evaluation needs, without an engine or a response.

    Where quantization is requested, the model is quantized after all other checks.

    Raises:
        EvaluationError, CheckpointError: something cannot be used, with the fix. Problems that can
            be found together are reported together.
    """
    problems = _number_problems(settings)

    def attempt(action: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except EvaluationError as error:
            problems.extend(error.problems)
        except CheckpointError as error:
            problems.append(f"MODEL {settings.model}: {error}")
        return None

    on_cpu = attempt(_on_cpu)
    given = dict.fromkeys(settings.data)
    data = [attempt(read_data, name, settings.limit, settings.prompt_key) for name in given]
    reward = attempt(Reward, settings.reward_function)
    folder = attempt(fetch_model, settings.model)
    adapters = folder and attempt(check_adapters, settings.adapters, folder)
    if folder and on_cpu and (problem := cpu_head_size_problem(folder)):
        problems.append(f"MODEL {settings.model}: {problem}")
    if problems:
        raise EvaluationError(problems)
    for source in {p.source: p for d in data for p in d.problems}.values():
        reward(source, "")  # a failure shows here and not after the first response
    prompts, template = _tokenize(settings, folder, data)
    _check_length(settings, folder, prompts)
    model = find_model(settings.model, settings.cache_dir, settings.quantization)
    if not settings.other_base:
        check_bases(adapters, model)
    policies: dict[str, Adapter | None] = {BASE: None} if settings.with_base or not adapters else {}
    policies |= {adapter.name: adapter for adapter in adapters}
    return Plan(settings, model, policies, data, prompts, template, reward, on_cpu)


def _number_problems(settings: EvaluationSettings) -> list[str]:
    problems = []
    for name, value, smallest in (
        ("--samples", settings.samples, 1),
        ("--max-tokens", settings.max_tokens, 1),
        ("--limit", 1 if settings.limit is None else settings.limit, 1),
        ("--temperature", settings.temperature, 0),
        ("--tensor-parallel-size", settings.engine.tensor_parallel_size, 1),
        ("--max-num-seqs", settings.engine.max_num_seqs or 1, 1),
    ):
        if value < smallest:
            problems.append(f"{name} {value}: it has to be {smallest} or more")
    for name, share, example in (
        ("--top-p", settings.top_p, 0.95),
        ("--gpu-memory-utilization", settings.engine.gpu_memory_utilization or 1, 0.9),
    ):
        if not 0 < share <= 1:
            problems.append(f"{name} {share}: it has to be above 0 and at most 1, for example {example}")
    if not 0 < settings.confidence < 1:
        problems.append(f"--confidence {settings.confidence}: it has to lie between 0 and 1, for example 0.95")
    for k in settings.ks:
        if not 1 <= k <= settings.samples:
            problems.append(f"--k {k}: it has to lie between 1 and --samples, which is {settings.samples}")
    if settings.temperature == 0 and settings.samples > 1:
        problems.append(
            f"--samples {settings.samples}: with --temperature 0 all responses to a problem are the same; set --samples 1"
        )
    return problems


def _on_cpu() -> bool:
    """Returns whether vLLM runs on the CPU of this machine.

    Raises:
        EvaluationError: vLLM would not load QeRL's layers, or does not run on this machine.
    """
    from qerl_verl.config.checks.plugins import find_problems
    from qerl_verl.config.host import Host, choose_platform
    from qerl_verl.config.settings import SettingsError

    if problems := find_problems(os.environ):
        raise EvaluationError(problems)
    try:
        return choose_platform("auto", Host.here(), joins=False)[0] == "cpu"
    except SettingsError as error:
        raise EvaluationError(str(error)) from error


def _tokenize(
    settings: EvaluationSettings, folder: Path, data: list[DataSet]
) -> tuple[dict[tuple[str, int], list[int]], str]:
    """Returns the token ids of the prompts, and the chat template that made them.

    They equal those of verl's rollout (verl/experimental/agent_loop/agent_loop.py,
    ct_build_initial_tokens).
    """
    from transformers import AutoConfig
    from verl.utils.tokenizer import hf_tokenizer
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    from qerl_verl.config.checks.tokenizers import folder_problem

    if problem := folder_problem(folder, f"MODEL {settings.model}"):
        raise EvaluationError(problem)
    tokenizer = hf_tokenizer(str(folder))
    if settings.chat_template is not None:
        tokenizer.chat_template = settings.chat_template
    if not tokenizer.chat_template:
        raise EvaluationError(
            f"MODEL {settings.model}: its tokenizer has no chat template, which verl makes every "
            "prompt with; give one with --chat-template FILE"
        )
    arguments = {
        k: v for k, v in settings.chat_template_arguments.items() if k not in ("tokenize", "add_generation_prompt")
    }
    model_type = AutoConfig.from_pretrained(folder).model_type
    builder = create_continuous_token_builder(tokenizer, hf_model_type=model_type, chat_template_kwargs=arguments)
    prompts = {}
    problems = [(each.name, problem) for each in data for problem in each.problems]
    for name, problem in tqdm(problems, desc="Making prompts", unit="prompt", delay=5, leave=False):
        try:
            prompts[name, problem.index] = list(builder.build_initial_tokens(problem.messages))
        except Exception as error:  # from jinja, or from the template's own raise_exception
            raise EvaluationError(
                f"--data {name}, row {problem.index}: the chat template fails on its prompt: "
                f"{' '.join(str(error).split())[:200]}; fix the prompt, or give another with "
                "--chat-template FILE"
            ) from error
    return prompts, str(tokenizer.chat_template)


def _check_length(settings: EvaluationSettings, folder: Path, prompts: dict[tuple[str, int], list[int]]) -> None:
    from transformers import AutoConfig

    context = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
    prompt = max(map(len, prompts.values()))
    if context is not None and prompt + settings.max_tokens > context:
        fix = f"set --max-tokens {context - prompt} or less" if prompt < context else "take that prompt out"
        raise EvaluationError(
            f"the longest prompt has {prompt} tokens; with --max-tokens {settings.max_tokens} that "
            f"is more than the {context} that {settings.model} can see: {fix}"
        )


def seed_of(seed: int, index: int, sample: int) -> int:
    """Returns the seed of one response.

    It is the same in every call and for every policy, so that policies see the same draws.
    """
    digest = hashlib.sha256(f"{seed}/{index}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def evaluate(plan: Plan, start_engine: Callable[[Plan], Engine] | None = None, progress: bool = True) -> list[Result]:
    """Samples the responses that the file lacks, and summarizes the scores.

    Args:
        plan: from :func:`prepare`.
        start_engine: makes the engine. It is called once, and only where a response is missing.
        progress: show progress bars on stderr.

    Raises:
        EvaluationError: the file belongs to another evaluation, or the reward function fails.
    """
    with ResponseFile(plan.settings.responses, plan.identity()) as file:
        lacking = {
            policy: [(key, problem) for key, problem in plan.wanted(policy) if key not in file.done]
            for policy in plan.policies
        }
        if any(lacking.values()):
            engine = (start_engine or start)(plan)
            try:
                _sample(plan, engine, lacking, file, progress)
            finally:
                engine.close()
        return _results(plan, file)


def start(plan: Plan) -> Engine:
    """Starts the engine of a plan."""
    adapters = [adapter for adapter in plan.policies.values() if adapter is not None]
    print(f"qerl: starting vLLM on {plan.model.folder} ({plan.model.form})", file=sys.stderr, flush=True)
    began = time.monotonic()
    engine = Engine(plan.model, adapters, plan.longest, plan.settings.engine, plan.on_cpu)
    print(f"qerl: vLLM started in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return engine


def _sample(
    plan: Plan,
    engine: Engine,
    lacking: dict[str, list[tuple[ResponseKey, Problem]]],
    file: ResponseFile,
    progress: bool,
) -> None:
    from verl.utils.tokenizer import hf_tokenizer

    settings = plan.settings
    tokenizer = hf_tokenizer(str(plan.model.folder))
    sampling = Sampling(settings.temperature, settings.top_p, settings.max_tokens)
    for policy, wanted in lacking.items():
        if not wanted:
            continue
        engine.use(plan.policies[policy])
        requests = (
            Request((key, problem), plan.prompts[key[1], key[2]], seed_of(settings.seed, key[2], key[3]))
            for key, problem in wanted
        )
        total = sum(1 for _ in plan.wanted(policy))
        right = seen = 0
        with tqdm(
            total=total,
            initial=total - len(wanted),
            desc=policy[-40:],
            unit="response",
            disable=not progress,
            mininterval=0.2 if sys.stderr.isatty() else 30,
        ) as bar:
            for request, tokens, finish in engine.generate(requests, sampling):
                key, problem = request.key
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                score = plan.reward(problem, text)
                policy, data, index, sample = key
                file.add(
                    Response(
                        policy=policy,
                        data=data,
                        index=index,
                        sample=sample,
                        seed=request.seed,
                        score=score.value,
                        tokens=len(tokens),
                        finish=finish,
                        text=text,
                        details=score.details,
                    )
                )
                seen, right = seen + 1, right + (score.value >= settings.correct_from)
                bar.set_postfix_str(f"{100 * right / seen:.1f} % right", refresh=False)
                bar.update()


def _results(plan: Plan, file: ResponseFile) -> list[Result]:
    settings, out = plan.settings, []
    for data in plan.data:
        for source in dict.fromkeys(problem.source for problem in data.problems):
            first = None
            for policy in plan.policies:
                rows = [
                    [file.done[policy, data.name, problem.index, sample] for sample in range(settings.samples)]
                    for problem in data.problems
                    if problem.source == source
                ]
                result, values = summarize(
                    policy,
                    data.name,
                    source,
                    plan.reward.name(source),
                    rows,
                    sorted(set(settings.ks)),
                    correct_from=settings.correct_from,
                    confidence=settings.confidence,
                    first=first,
                )
                first = first or values
                out.append(result)
    return out


def report(plan: Plan, results: Sequence[Result]) -> dict[str, Any]:
    """Returns the content of ``--json``: request, environment and results, as fractions of 1."""
    packages = ("verl", "vllm", "torch", "transformers", "peft")
    settings, model = plan.settings, plan.model
    adapters = [adapter for adapter in plan.policies.values() if adapter is not None]
    return {
        "command": sys.argv,
        "model": {
            "given": model.given,
            "folder": str(model.folder),
            "form": model.form,
            "fingerprint": model.fingerprint,
            "dtype": engines.compute_dtype(settings.engine.dtype, plan.on_cpu),
        },
        "adapters": [{"name": a.name, "rank": a.rank, "scaling": a.scaling, "digest": a.digest} for a in adapters],
        "data": [{"name": d.name, "problems": len(d.problems), "digest": d.digest} for d in plan.data],
        "sampling": {
            "samples": settings.samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": settings.seed,
        },
        "correct_from": settings.correct_from,
        "confidence": settings.confidence,
        "responses": str(settings.responses),
        "device": "cpu" if plan.on_cpu else _gpu_name(),
        "versions": {"qerl_verl": qerl_verl.__version__, **{name: version(name) for name in packages}},
        "results": [as_json(result) for result in results],
    }


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file by a rename, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(path, content)


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()
