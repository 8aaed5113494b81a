"""Tests an evaluation without vLLM: what is refused, what is sampled, and how it continues."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qerl_verl.evaluation.engine import EngineSettings
from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.evaluation.run import EvaluationSettings, evaluate, prepare, report, seed_of, write_report
from qerl_verl.nvfp4.cache import Quantization

DIGIT_REWARD = str(Path(__file__).parents[1] / "integration" / "digit_reward.py")


class FakeEngine:
    """Generates text that depends on adapter, prompt and seed. ``stop_after`` interrupts it."""

    def __init__(self, plan, stop_after=None):
        self.plan, self.left, self.adapter = plan, stop_after, None
        self.calls: list[tuple] = []
        self.closed = False

    def use(self, adapter):
        self.adapter = adapter

    def generate(self, requests, sampling):
        name = self.adapter.digest if self.adapter else "base"
        for request in list(requests)[::-1]:  # in another order than they were asked for
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            self.calls.append((name, tuple(request.prompt), request.seed))
            tokens = list(hashlib.sha256(repr(self.calls[-1]).encode()).digest()[:8])
            yield request, tokens, "stop"

    def close(self):
        self.closed = True


@pytest.fixture
def settings(nvfp4_checkpoint, digits, write_adapter, tmp_path):
    adapters = [str(write_adapter(tmp_path / f"a{i}", seed=i)) for i in (1, 2)]
    return EvaluationSettings(
        str(nvfp4_checkpoint),
        [digits],
        tmp_path / "r.jsonl",
        adapters=adapters,
        with_base=True,
        samples=3,
        ks=(1, 3),
        max_tokens=8,
        reward_function=DIGIT_REWARD,
        cache_dir=tmp_path / "cache",
    )


def run(settings, stop_after=None):
    """Runs an evaluation and returns the engine and the results, which are None after an
    interruption.
    """
    engines = []

    def start(plan):
        engines.append(FakeEngine(plan, stop_after))
        return engines[-1]

    results = None
    try:
        results = evaluate(prepare(settings), start, progress=False)
    except KeyboardInterrupt:
        pass
    assert all(engine.closed for engine in engines)
    return (engines or [None])[0], results


def lines(settings):
    """Returns the lines without their order."""
    return sorted(settings.responses.read_text().splitlines())


def test_every_policy_problem_and_sample_once(settings):
    engine, results = run(settings)
    assert len(engine.calls) == 3 * 6 * 3 and max(Counter(engine.calls).values()) == 1
    assert [(r.policy, r.problems, r.samples) for r in results] == [
        (name, 6, 3) for name in ("base", *settings.adapters)
    ]
    assert not results[0].difference and results[1].difference.keys() == {1, 3}
    by_policy = {name: [c[1:] for c in engine.calls if c[0] == name] for name in {c[0] for c in engine.calls}}
    first, *others = by_policy.values()  # the same prompts and seeds for each
    assert all(calls == first for calls in others) and len(by_policy) == 3


@pytest.mark.parametrize("stop_after", [0, 1, 20, 53])
def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_responses(settings, tmp_path, stop_after):
    whole = replace(settings, responses=tmp_path / "whole.jsonl")
    _, expected = run(whole)
    engine, results = run(settings, stop_after)
    assert results is None and len(engine.calls) == stop_after
    content = settings.responses.read_bytes()
    if stop_after:
        settings.responses.write_bytes(content[:-7])  # killed while it wrote
    engine, results = run(settings)
    assert len(engine.calls) == 54 - max(stop_after - 1, 0)
    assert results == expected and lines(settings) == lines(whole)
    assert run(settings) == (None, expected)  # nothing is lacking: no engine


def test_more_samples_problems_or_adapters_add_to_what_is_there(settings):
    small = replace(settings, samples=1, ks=(1,), limit=2, adapters=settings.adapters[:1], with_base=False)
    engine, _ = run(small)
    assert len(engine.calls) == 2
    engine, results = run(settings)
    assert len(engine.calls) == 54 - 2
    assert run(replace(settings, responses=settings.responses.with_name("new.jsonl")))[1] == results
    assert run(small)[0] is None


@pytest.mark.parametrize(
    "change, name",
    [
        ({"temperature": 1.0}, "--temperature was 0.6 and is 1.0"),
        ({"top_p": 1.0}, "--top-p was 0.95 and is 1.0"),
        ({"max_tokens": 9}, "--max-tokens was 8 and is 9"),
        ({"seed": 1}, "--seed was 0 and is 1"),
        ({"reward_function": "pkg://qerl_verl.data.math_score"}, "--reward-function "),
        ({"chat_template": "{{ messages[0]['content'] }}"}, "--chat-template "),
        ({"chat_template_arguments": {"x": 1}}, "--chat-template-args was"),
        ({"engine": EngineSettings(dtype="float16")}, "--dtype was"),
    ],
)
def test_a_changed_argument_is_refused_by_name(settings, change, name):
    run(settings, stop_after=2)
    before = settings.responses.read_bytes()
    with pytest.raises(EvaluationError, match=name) as error:
        run(replace(settings, **change))
    assert str(error.value).count(" was ") == 1
    assert settings.responses.read_bytes() == before


def test_a_changed_model_adapter_or_data_set_is_refused_by_name(settings, bf16_checkpoint, write_adapter, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_bytes(Path(settings.data[0]).read_bytes())
    settings = replace(settings, data=[str(data)])
    run(settings, stop_after=2)
    with pytest.raises(EvaluationError, match="MODEL .* was"):
        run(replace(settings, model=str(bf16_checkpoint)))
    write_adapter(tmp_path / "a1", seed=7)
    with pytest.raises(EvaluationError, match=f"--adapter {tmp_path / 'a1'} .* was"):
        run(settings)
    write_adapter(tmp_path / "a1", seed=1)
    data.write_text(data.read_text().replace("5+5", "5+4"))
    with pytest.raises(EvaluationError, match=f"--data {data} .* was"):
        run(settings)


def test_seeds_differ_and_never_change():
    seeds = {seed_of(s, i, j) for s in range(3) for i in range(50) for j in range(8)}
    assert len(seeds) == 3 * 50 * 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, 0, 0) == 3051931488724851722


REFUSED = {
    "samples": ({"samples": 0}, "--samples 0: it has to be 1 or more"),
    "k above samples": ({"ks": (1, 4)}, "--k 4: it has to lie between 1 and --samples, which is 3"),
    "k of 0": ({"ks": (0,)}, "--k 0"),
    "temperature": ({"temperature": -1.0}, "--temperature -1.0"),
    "top-p": ({"top_p": 0.0}, "--top-p 0.0"),
    "tokens": ({"max_tokens": 0}, "--max-tokens 0"),
    "limit": ({"limit": 0}, "--limit 0"),
    "share of memory": ({"engine": EngineSettings(gpu_memory_utilization=90.0)}, "--gpu-memory-utilization 90.0"),
    "GPUs": ({"engine": EngineSettings(tensor_parallel_size=0)}, "--tensor-parallel-size 0"),
    "confidence": ({"confidence": 95.0}, "--confidence 95.0: .*0.95"),
    "several greedy samples": ({"temperature": 0.0}, "--temperature 0 all responses .* set --samples 1"),
    "no such model": ({"model": "missing/x/y"}, "there is no such folder"),
    "no such data": ({"data": ["missing.parquet"]}, "--data missing.parquet: there is no such file"),
    "no such adapter": ({"adapters": ["missing"]}, "--adapter missing: .*no adapter_config.json"),
    "no reward": ({"reward_function": None}, "data_source digits: verl has no reward for it"),
    "no such reward": ({"reward_function": "missing.py"}, "--reward-function missing.py"),
    "a broken template": ({"chat_template": "{{ raise_exception('no') }}"}, "row 0: the chat template fails"),
    "too many tokens": ({"max_tokens": 4096}, r"--max-tokens 4096 .*512 .*: set --max-tokens \d+ or less"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_engine_starts(settings, case):
    change, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        run(replace(settings, **change))
    assert not settings.responses.exists()


@pytest.mark.parametrize("on_cpu", [True, False])
def test_heads_that_vllm_has_no_cpu_kernel_for_are_refused_there(
    settings, nvfp4_checkpoint, monkeypatch, tmp_path, on_cpu
):
    model = shutil.copytree(nvfp4_checkpoint, tmp_path / "narrow heads")
    config = json.loads((model / "config.json").read_text())
    # matrices of the same shapes
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("qerl_verl.evaluation.run._on_cpu", lambda: on_cpu)
    if on_cpu:
        with pytest.raises(
            EvaluationError, match="narrow heads: its attention heads are 16 wide .* no kernel on a CPU"
        ):
            prepare(replace(settings, model=str(model)))
    else:
        prepare(replace(settings, model=str(model)))


def test_what_can_be_found_at_once_comes_at_once(settings):
    changes = {"samples": 0, "data": ["x.parquet", "y.csv"], "adapters": ["z"], "reward_function": "w.py", "ks": (9,)}
    with pytest.raises(EvaluationError) as error:
        prepare(replace(settings, **changes))
    starts = ["--samples 0", "--k 9", "--data x.parquet", "--data y.csv", "--reward-function w.py", "--adapter z"]
    assert [p[: len(start)] for p, start in zip(error.value.problems, starts, strict=True)] == starts


def test_a_model_is_quantized_when_all_else_has_been_checked(settings, bf16_checkpoint):
    wanted = replace(settings, model=str(bf16_checkpoint), quantization=Quantization("rtn"))
    for change in ({"max_tokens": 4096}, {"chat_template": "{{ raise_exception('no') }}"}, {"reward_function": None}):
        with pytest.raises(EvaluationError):
            prepare(replace(wanted, **change))
    assert not list(settings.cache_dir.glob("*/config.json"))
    assert prepare(wanted).model.folder.parent == settings.cache_dir


@pytest.mark.parametrize("other_base", [True, False])
def test_an_adapter_of_another_base_is_taken_where_that_is_asked_for(settings, write_adapter, tmp_path, other_base):
    write_adapter(tmp_path / "global_step_1" / "actor" / "lora_adapter")
    (tmp_path / "global_step_1" / "qerl_checkpoint.json").write_text(json.dumps({"base": {"actor": "0123"}}))
    settings = replace(settings, adapters=[str(tmp_path / "global_step_1")], other_base=other_base)
    if other_base:
        assert len(run(settings)[1]) == 2
    else:
        with pytest.raises(EvaluationError, match="it was trained on other weights"):
            run(settings)


def test_the_number_of_tokens_in_the_message_is_the_largest_that_fits(settings):
    with pytest.raises(EvaluationError) as error:
        prepare(replace(settings, max_tokens=4096))
    fitting = int(str(error.value).split("--max-tokens ")[-1].split()[0])
    assert prepare(replace(settings, max_tokens=fitting)).longest == 512
    with pytest.raises(EvaluationError):
        prepare(replace(settings, max_tokens=fitting + 1))


def test_prompts_are_those_of_verls_rollout(settings, nvfp4_checkpoint):
    """verl's agent loop makes prompts with the tokenizer's template and the start of the answer."""
    from transformers import AutoTokenizer

    plan = prepare(settings)
    tokenizer = AutoTokenizer.from_pretrained(nvfp4_checkpoint)
    for problem in plan.data[0].problems:
        text = tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert plan.prompts[plan.data[0].name, problem.index] == ids


def test_without_the_plugin_of_vllm_nothing_starts(settings, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EvaluationError, match="VLLM_PLUGINS=other keeps vLLM from loading"):
        prepare(settings)


def test_the_report_says_what_was_asked_and_found(settings, tmp_path):
    _, results = run(settings)
    plan = prepare(settings)
    write_report(tmp_path / "new" / "out.json", report(plan, results))
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert found["sampling"] == {"samples": 3, "temperature": 0.6, "top_p": 0.95, "max_tokens": 8, "seed": 0}
    assert [a["name"] for a in found["adapters"]] == settings.adapters and found["model"]["form"] == "nvfp4"
    assert [r["policy"] for r in found["results"]] == ["base", *settings.adapters]
    assert found["results"][1]["pass@3"]["low"] <= found["results"][1]["pass@3"]["high"]
    assert found["versions"]["vllm"] and found["device"]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.json"]


def test_progress_is_shown_from_where_it_goes_on(settings, capsys):
    """A log has one line at the start and one at the end, not one for each response."""
    run(settings, stop_after=20)  # all of the first policy's 18 and two of the next
    evaluate(prepare(settings), FakeEngine)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    bars = [line for line in lines if "response" in line]
    assert any(" 2/18 " in line for line in bars) and sum(" 18/18 " in line for line in bars) == 2
    assert len(bars) < 8 and "% right" in bars[-1]
