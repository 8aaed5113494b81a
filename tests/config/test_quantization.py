"""Which method a run quantizes by, and with which text."""

import pytest
from omegaconf import OmegaConf

import qerl_verl.plugin  # noqa: F401  (as verl loads it; a run asks for that)
from qerl_verl.cli.explain import compose
from qerl_verl.config import replace_models
from qerl_verl.config.host import Host
from qerl_verl.config.plan import plan
from qerl_verl.config.quantization import choose_quantization, find_problems
from qerl_verl.config.settings import QeRLSettings
from qerl_verl.nvfp4 import cache
from qerl_verl.nvfp4.calibration import read_calibration

TRAIN = {"data": {"train_files": ["a.parquet", "b.parquet"], "prompt_key": "chat"}}


def choice(data=TRAIN, gpu=True, arm="nvfp4", **quantization):
    settings = QeRLSettings.from_mapping({"arm": arm, "quantization": quantization})
    return choose_quantization(OmegaConf.create(data), settings, gpu)


@pytest.mark.parametrize(
    ("made", "method", "reason", "files"),
    [
        (choice(), "gptq", "auto, on a GPU", ("a.parquet", "b.parquet")),
        (choice(gpu=False), "four-over-six", "no GPU", ()),
        (choice({"data": {}}), "four-over-six", "no text", ()),
        (choice({"data": {"train_files": "a", "custom_cls": {"path": "mine.py"}}}), "four-over-six", "no text", ()),
        (choice({"data": {}}, calibration="book.txt"), "gptq", "a GPU", ("book.txt",)),
        (choice(calibration="book.txt"), "gptq", "a GPU", ("book.txt",)),
        (choice(arm="mxfp4"), "mxfp4", "the arm's own", ()),
        (choice(method="rtn"), "rtn", "qerl.quantization.method", ()),
        (choice(method="gptq", gpu=False), "gptq", "qerl.quantization.method", ("a.parquet", "b.parquet")),
    ],
)
def test_method(made, method, reason, files):
    assert (made.method, made.files) == (method, files)
    assert reason in made.reason and reason in made.line and method in made.line
    assert find_problems(made) == (
        ["qerl.quantization.calibration=book.txt: there is no such file"] if files == ("book.txt",) else []
    )


def test_other_arms_quantize_nothing_here():
    assert choice(arm="bf16") is None


def test_gptq_without_text_is_refused():
    (problem,) = find_problems(choice({"data": {}}, method="gptq"))
    assert "qerl.quantization.method=gptq needs text" in problem and "qerl.quantization.calibration" in problem


def planned(model, *overrides):
    overrides = ["+qerl=nvfp4", "algorithm.adv_estimator=grpo", f"actor_rollout_ref.model.path={model}", *overrides]
    return plan(compose("ppo_trainer", overrides), set(), Host(cpus=64, gpus=0, cpu_vllm=True))


def test_it_is_said_where_there_is_something_to_quantize(bf16_checkpoint, nvfp4_checkpoint):
    said = [line for line in planned(bf16_checkpoint).lines if "quantization of a model" in line]
    assert len(said) == 1 and "four-over-six (no GPU)" in said[0]
    assert not any("quantization of a model" in line for line in planned(nvfp4_checkpoint).lines)
    problems = planned(
        bf16_checkpoint, "qerl.quantization.method=gptq", "qerl.quantization.calibration=/none.txt"
    ).problems
    assert "qerl.quantization.calibration=/none.txt: there is no such file" in problems
    assert not any(
        "none.txt" in p for p in planned(nvfp4_checkpoint, "qerl.quantization.calibration=/none.txt").problems
    )


def test_the_cache_gets_what_was_chosen(monkeypatch, bf16_checkpoint, gsm8k_files, tmp_path):
    """As the callback asks for it; `qerl resolve --calibration` with the same file finds the same
    entry."""
    asked = []
    monkeypatch.setattr(cache, "quantize_checkpoint", lambda src, dst, **how: asked.append(how) or 1 / 0)
    data = {"data": {"train_files": "data/gsm8k/train.parquet", "prompt_key": "prompt"}}
    settings = QeRLSettings.from_mapping({"cache_dir": str(tmp_path / "cache"), "quantization": {"method": "gptq"}})
    made = choose_quantization(OmegaConf.create(data), settings, gpu=False)
    with pytest.raises(ZeroDivisionError):
        replace_models.resolve("model.path", str(bf16_checkpoint), settings, made)
    (how,) = asked
    assert how["method"] == "gptq" and how["device"] == "cpu"
    assert how["calibration"].key == read_calibration("data/gsm8k/train.parquet", bf16_checkpoint).key


def test_text_that_cannot_be_used_names_the_setting(bf16_checkpoint, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"unknown": 1}\n')
    settings = QeRLSettings.from_mapping({"cache_dir": str(tmp_path), "quantization": {"method": "gptq"}})
    made = choose_quantization(
        OmegaConf.create({"data": {"train_files": str(tmp_path / "rows.jsonl")}}), settings, False
    )
    with pytest.raises(replace_models.SettingsError, match="usable rows.*qerl.quantization.calibration"):
        replace_models.resolve("model.path", str(bf16_checkpoint), settings, made)
