"""Tests an evaluation in a real vLLM engine: adapters are applied, and an interrupted one continues
to the same responses.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qerl_verl.cli.main import main
from qerl_verl.evaluation import run
from qerl_verl.evaluation.engine import Request, Sampling
from qerl_verl.evaluation.run import EvaluationSettings, evaluate, prepare

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="drives vLLM's CPU engine inside pytest"),
]

DIGIT_REWARD = str(Path(__file__).parents[1] / "integration" / "digit_reward.py")
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_tokens=6)


@pytest.fixture(scope="module")
def settings(nvfp4_checkpoint, digits, write_adapter, tmp_path_factory):
    """Returns two adapters of different rank and scaling."""
    folder = tmp_path_factory.mktemp("live")
    adapters = [
        str(write_adapter(folder / "a1", rank=8, alpha=16, seed=1)),
        str(write_adapter(folder / "a2", rank=4, alpha=12, seed=2)),
    ]
    return EvaluationSettings(
        str(nvfp4_checkpoint),
        [digits],
        folder / "responses.jsonl",
        adapters=adapters,
        with_base=True,
        samples=3,
        ks=(1, 3),
        max_tokens=12,
        reward_function=DIGIT_REWARD,
        correct_from=0.1,
        cache_dir=folder / "cache",
    )


class Kept:
    """An engine that stays when an evaluation closes it."""

    def __init__(self, engine, stop_after=None):
        self.engine, self.left = engine, stop_after

    def use(self, adapter):
        self.engine.use(adapter)

    def generate(self, requests, sampling):
        for found in self.engine.generate(requests, sampling):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left = None if self.left is None else self.left - 1
            yield found

    def close(self):
        pass


def started(settings):
    """Yields the engine of an evaluation, and restores the environment."""
    before = dict(os.environ)
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR"}
    engine = run.start(prepare(settings))
    try:
        yield engine
    finally:
        engine.close()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module")
def engine(settings):
    yield from started(settings)


def greedy(plan, engine, policy):
    """Returns greedy tokens of each problem."""
    engine.use(plan.policies[policy])
    requests = [Request(index, plan.prompts[plan.data[0].name, index], seed=0) for index in range(6)]
    return {request.key: tokens for request, tokens, _ in engine.generate(requests, GREEDY)}


def regret(model, prompts, tokens):
    """Returns by how many nats the best token was more probable than the chosen one, at each
    position.
    """
    out = []
    for index, chosen in tokens.items():
        with torch.no_grad():
            logits = model(torch.tensor([[*prompts[index], *chosen]])).logits[0, len(prompts[index]) - 1 : -1]
        best, chosen = logits.log_softmax(-1), torch.tensor(chosen)[:, None]
        out.append((best.max(-1, keepdim=True).values - best.gather(-1, chosen))[:, 0])
    return torch.cat(out)


def check_adapters_are_applied(settings, engine, checkpoint):
    """Checks that a policy's greedy tokens are the best ones of PEFT's model with that adapter
    only.
    """
    from peft import PeftModel

    plan = prepare(settings)
    prompts = {index: prompt for (_, index), prompt in plan.prompts.items()}
    names = list(plan.policies)
    # and back to the first ones
    tokens = {name: greedy(plan, engine, name) for name in (*names, *names[:2])}
    assert len({str(sorted(t.items())) for t in tokens.values()}) == 3
    for name in names:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        if plan.policies[name] is not None:
            model = PeftModel.from_pretrained(model, name)
        for other in names:
            found = regret(model, prompts, tokens[other])
            if other == name:
                assert found.max() < 0.3  # a tie, as bfloat16 has them
            else:
                assert found.mean() > 0.5


def test_the_adapters_are_applied(settings, engine, dequantized_checkpoint):
    check_adapters_are_applied(settings, engine, dequantized_checkpoint)


def test_the_engines_processes_are_in_groups_of_their_own(engine):
    """Ctrl-C does therefore not reach them, see processes.py."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    names = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    engines = [child for child, name in names.items() if name.startswith(b"VLLM::")]
    assert engines and all(os.getpgid(child) == child for child in engines)


def read(settings):
    """Returns key -> (text, tokens) of the responses in the file."""
    records = [json.loads(line) for line in settings.responses.read_text().splitlines()]
    records = [record for record in records if "settings" not in record]
    found = {(r["policy"], r["index"], r["sample"]): (r["text"], r["tokens"], r["seed"]) for r in records}
    assert len(found) == len(records)
    return found


@pytest.fixture(scope="module")
def whole(settings, engine):
    """Runs an evaluation without interruption and returns its results and responses."""
    results = evaluate(prepare(settings), lambda plan: Kept(engine), progress=False)
    return results, read(settings)


def test_an_adapter_changes_the_samples(settings, whole):
    results, found = whole
    assert [r.policy for r in results] == ["base", *settings.adapters] and len(found) == 3 * 6 * 3
    by_policy = {p: [found[p, i, j] for i in range(6) for j in range(3)] for p in ("base", *settings.adapters)}
    seeds = {policy: [seed for _, _, seed in rows] for policy, rows in by_policy.items()}
    assert all(s == seeds["base"] for s in seeds.values()) and len(set(seeds["base"])) == 18
    for policy in settings.adapters:
        same = sum(a == b for a, b in zip(by_policy["base"], by_policy[policy], strict=True))
        assert same < 6
    assert len(set(by_policy["base"][:3])) > 1  # samples of one problem differ


@pytest.mark.parametrize("stop_after", [1, 25])
def test_an_interrupted_evaluation_goes_on_to_the_same_responses(settings, engine, whole, tmp_path, stop_after):
    """Other requests share the batches after an interruption, so ties within bfloat16's rounding
    may differ.
    """
    settings = replace(settings, responses=tmp_path / "r.jsonl")
    with pytest.raises(KeyboardInterrupt):
        evaluate(prepare(settings), lambda plan: Kept(engine, stop_after), progress=False)
    assert len(read(settings)) == stop_after
    results = evaluate(prepare(settings), lambda plan: Kept(engine), progress=False)
    found, expected = read(settings), whole[1]
    assert found.keys() == expected.keys() and [r.policy for r in results] == [r.policy for r in whole[0]]
    assert sum(found[key] == expected[key] for key in found) >= 0.9 * len(found)


def test_the_command(settings, engine, whole, tmp_path, capsys, monkeypatch):
    """The command prints a table, writes JSON, and keeps the responses beside it."""
    monkeypatch.setattr(run, "start", lambda plan: Kept(engine))
    command = ["eval", settings.model, "--data", *settings.data, "--adapter", *settings.adapters, "--with-base"]
    command += ["--samples", "3", "--k", "1", "3", "--max-tokens", "12", "--reward-function", DIGIT_REWARD]
    command += ["--correct-from", "0.1", "--json", str(tmp_path / "out.json"), "--cache-dir", str(settings.cache_dir)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 5 and lines[0].startswith("policy") and "18/18" in err
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [r["pass@3"]["value"] for r in found] == [pytest.approx(r.pass_at[3].value, abs=0.2) for r in whole[0]]
    assert (tmp_path / "out.responses.jsonl").is_file()


@pytest.mark.slow
def test_a_16_bit_model_with_adapters(settings, bf16_checkpoint, tmp_path):
    """The adapters are on vLLM's own LoRA path, as in the arm bf16."""
    settings = replace(settings, model=str(bf16_checkpoint), responses=tmp_path / "r.jsonl")
    for engine in started(settings):
        check_adapters_are_applied(settings, engine, bf16_checkpoint)
        results = evaluate(prepare(settings), lambda plan, kept=Kept(engine): kept, progress=False)
        assert len(results) == 3 and len(read(settings)) == 54
