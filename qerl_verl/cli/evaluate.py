"""Implements ``qerl eval``: its arguments and its output."""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

from qerl_verl.config.settings import ROLLOUT_KERNELS
from qerl_verl.evaluation.errors import EvaluationError

DEFAULT_RESPONSES = Path("responses.jsonl")
STDOUT = Path("-")


def add_eval(subparsers, common: argparse.ArgumentParser) -> None:
    """Declares the subcommand."""
    parser = subparsers.add_parser(
        "eval",
        parents=[common],
        help="pass@1 and pass@k of a model, or of adapters on it, with confidence intervals",
    )
    parser.add_argument("model", help="local folder or name on the Hugging Face hub; evaluated in the form that it has")
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME | NAME=FILE | FILE",
        help="gsm8k, math500, aime24, aime25, amc23 (from the hub, or from their own JSONL); or a parquet or JSONL file with "
        "verl's columns",
    )
    parser.add_argument(
        "--adapter",
        nargs="+",
        action="extend",
        default=[],
        metavar="FOLDER",
        help="PEFT adapters, checkpoints (global_step_N), or runs (all of their checkpoints); one engine serves all",
    )
    parser.add_argument("--with-base", action="store_true", help="evaluate the model without an adapter, too")
    parser.add_argument(
        "--other-base", action="store_true", help="take adapters that were trained on other weights than MODEL's"
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="N", help="responses to each problem (default: %(default)s)"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[1], help="which pass@k to estimate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.6, help="default: %(default)s, as the paper")
    parser.add_argument("--top-p", type=float, default=0.95, help="default: %(default)s, as the paper")
    parser.add_argument(
        "--max-tokens", type=int, default=4096, help="of a response (default: %(default)s, as the paper)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N problems of each data set")
    parser.add_argument(
        "--reward-function",
        metavar="FILE[:NAME]",
        help="as verl's reward.custom_reward_function (default: by the data source)",
    )
    parser.add_argument(
        "--correct-from", type=float, default=1.0, help="smallest score of a right response (default: %(default)s)"
    )
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    parser.add_argument("--prompt-key", default="prompt", help="as verl's data.prompt_key (default: %(default)s)")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="in place of the tokenizer's")
    parser.add_argument(
        "--chat-template-args", default="{}", metavar="JSON", help="as verl's data.apply_chat_template_kwargs"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there; - is stdout")
    parser.add_argument(
        "--responses",
        type=Path,
        metavar="FILE",
        help="JSONL of all responses, from which an interrupted evaluation continues (default: NAME.responses.jsonl beside "
        f"--json NAME.json, else {DEFAULT_RESPONSES})",
    )
    _add_quantization(parser)
    _add_engine(parser)
    parser.set_defaults(run=_run)


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantizing a 16- or 32-bit model first, into the cache")
    group.add_argument("--quantize", choices=("rtn", "four-over-six", "gptq", "mxfp4"), help="how")
    group.add_argument("--calibration", type=Path, nargs="+", metavar="FILE", help="text for gptq")
    group.add_argument("--calibration-samples", type=int, default=128, help="default: %(default)s")
    group.add_argument("--calibration-tokens", type=int, default=512, help="default: %(default)s")
    group.add_argument("--cache-dir", type=Path, help="default: $QERL_CACHE or ~/.cache/qerl_verl")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("vLLM")
    group.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    group.add_argument(
        "--kernel",
        choices=ROLLOUT_KERNELS,
        default="auto",
        help="of NVFP4 layers, as qerl.rollout.kernel (default: %(default)s)",
    )
    group.add_argument("--lora", choices=("inline", "punica"), default="inline", help="as qerl.rollout.lora")
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="GPUS")
    group.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="responses at the same time")
    group.add_argument("--enforce-eager", action="store_true", help="a faster start, slower sampling")


def responses_file(arguments: argparse.Namespace) -> Path:
    """Returns the file of responses."""
    if arguments.responses is not None:
        return arguments.responses
    if arguments.json in (None, STDOUT):
        return DEFAULT_RESPONSES
    return arguments.json.with_suffix(".responses.jsonl")


def read_settings(arguments: argparse.Namespace):
    """Returns the settings of the arguments.

    Raises:
        EvaluationError: arguments are not JSON or do not go together, or a file cannot be read.
    """
    from qerl_verl.evaluation.engine import EngineSettings
    from qerl_verl.evaluation.run import EvaluationSettings

    try:
        template_arguments = json.loads(arguments.chat_template_args)
        if not isinstance(template_arguments, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise EvaluationError(
            f"--chat-template-args {arguments.chat_template_args}: {error}; give a JSON object, as "
            "'{\"enable_thinking\": false}'"
        ) from None
    engine = EngineSettings(
        dtype=arguments.dtype,
        kernel=arguments.kernel,
        lora=arguments.lora,
        tensor_parallel_size=arguments.tensor_parallel_size,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        max_num_seqs=arguments.max_num_seqs,
        enforce_eager=arguments.enforce_eager,
    )
    return EvaluationSettings(
        model=arguments.model,
        data=arguments.data,
        responses=responses_file(arguments),
        adapters=arguments.adapter,
        with_base=arguments.with_base,
        other_base=arguments.other_base,
        samples=arguments.samples,
        ks=arguments.k,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=arguments.max_tokens,
        seed=arguments.seed,
        limit=arguments.limit,
        reward_function=arguments.reward_function,
        correct_from=arguments.correct_from,
        confidence=arguments.confidence,
        prompt_key=arguments.prompt_key,
        chat_template=arguments.chat_template and arguments.chat_template.read_text(encoding="utf-8"),
        chat_template_arguments=template_arguments,
        quantization=_quantization(arguments),
        cache_dir=arguments.cache_dir,
        engine=engine,
    )


def _quantization(arguments: argparse.Namespace):
    from qerl_verl.config.host import is_cpu_build
    from qerl_verl.nvfp4.cache import Quantization
    from qerl_verl.nvfp4.calibration import read_calibration

    method, files = arguments.quantize, arguments.calibration
    if files and method != "gptq":
        raise EvaluationError("--calibration: it is the text for --quantize gptq; give both, or neither")
    if method is None:
        return None
    if method == "gptq" and not files:
        raise EvaluationError("--quantize gptq needs a calibration text (--calibration FILE)")
    sizes = dict(samples=arguments.calibration_samples, sample_tokens=arguments.calibration_tokens)
    calibration = partial(read_calibration, files, **sizes) if files else None
    # in a process of its own on a GPU, so that no CUDA memory stays allocated
    return Quantization(method, calibration, isolated=not is_cpu_build())


def _run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    from qerl_verl.evaluation.report import format_table
    from qerl_verl.evaluation.run import evaluate, prepare, report, write_report

    plan = prepare(read_settings(arguments))
    for note in plan.model.notes:
        print(f"qerl: {note}", file=sys.stderr)
    try:
        results = evaluate(plan)
    except KeyboardInterrupt:
        print(
            f"\nqerl: the responses so far are in {plan.settings.responses}; the same command continues",
            file=sys.stderr,
        )
        raise
    on_stdout = arguments.json == STDOUT
    print(format_table(results), file=sys.stderr if on_stdout else sys.stdout)
    if on_stdout:
        print(json.dumps(report(plan, results), allow_nan=False))
    elif arguments.json:
        write_report(arguments.json, report(plan, results))
    return 0
