"""Tests which models and adapters an evaluation takes, and which it refuses before an engine
starts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from qerl_verl.evaluation.errors import EvaluationError
from qerl_verl.evaluation.policies import check_adapters, check_bases, expand, find_model, write_plain
from qerl_verl.nvfp4.cache import Quantization, fingerprint
from qerl_verl.nvfp4.errors import CheckpointError


@pytest.fixture
def model(nvfp4_checkpoint, tmp_path):
    return find_model(str(nvfp4_checkpoint), tmp_path / "cache")


def test_a_model_is_taken_in_the_form_that_it_has(model, nvfp4_checkpoint, bf16_checkpoint, tmp_path):
    assert (model.form, model.folder) == ("nvfp4", nvfp4_checkpoint)
    plain = find_model(str(bf16_checkpoint), tmp_path / "cache")
    assert (plain.form, plain.folder) == ("bf16", bf16_checkpoint)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").glob("*/config.json"))
    packed = find_model(str(bf16_checkpoint), tmp_path / "cache", Quantization("rtn"))
    assert packed.form == "nvfp4" and packed.folder.parent == tmp_path / "cache"
    assert len({model.fingerprint, plain.fingerprint}) == 2


def test_models_that_are_refused(nvfp4_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="quantized already; leave --quantize out"):
        find_model(str(nvfp4_checkpoint), tmp_path / "cache", Quantization("rtn"))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_model(str(tmp_path / "missing"), tmp_path / "cache")


def checkpoint(folder, write, base, **arguments):
    """Returns a ``global_step_N`` as the trainer writes it."""
    write(folder / "actor" / "lora_adapter", **arguments)
    (folder / "qerl_checkpoint.json").write_text(json.dumps({"base": {"actor": base}, "files": {}}))
    return folder


def test_adapters_and_checkpoints_are_found(model, write_adapter, tmp_path):
    plain = write_adapter(tmp_path / "plain", rank=4, alpha=16)
    step = checkpoint(tmp_path / "global_step_1", write_adapter, model.fingerprint, seed=2)
    found = check_adapters([str(plain), f"{step}/", f"{step}/actor"], model.folder)
    assert [a.name for a in found] == [str(plain), str(step), f"{step}/actor"]
    assert [(a.rank, a.scaling) for a in found] == [(4, 4.0), (8, 2.0), (8, 2.0)]
    assert found[1].digest == found[2].digest != found[0].digest


def test_the_folder_of_a_run_stands_for_its_checkpoints(tmp_path):
    for name in ("global_step_20", "global_step_3", "global_step_100", "global_step_x", "logs"):
        (tmp_path / "run" / name).mkdir(parents=True)
    run = str(tmp_path / "run")
    assert expand([f"{run}/", "other"]) == [*(f"{run}/global_step_{n}" for n in (3, 20, 100)), "other"]


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
)
def test_an_adapter_under_other_names_reaches_the_engine_under_pefts(model, write_adapter, tmp_path, rename):
    expected = load_file(write_adapter(tmp_path / "a") / "adapter_model.safetensors")
    (adapter,) = check_adapters([str(write_adapter(tmp_path / "b", rename=rename))], model.folder)
    write_plain(adapter, model, tmp_path / "c")
    found = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)


def test_an_adapter_that_was_replaced_meanwhile_is_refused(model, write_adapter, tmp_path):
    (adapter,) = check_adapters([str(write_adapter(tmp_path / "a"))], model.folder)
    write_adapter(tmp_path / "a", seed=2)
    with pytest.raises(EvaluationError, match="replaced while the evaluation ran"):
        write_plain(adapter, model, tmp_path / "c")


WIDE = {f"model.layers.{i}.mlp.down_proj": (128, 512) for i in range(2)}
"""Where the model has 256 columns."""

REFUSED = {
    "no folder": ({}, "no adapter_config.json in it"),
    "rank 0": ({"settings": {"r": 0}}, "r=0 in its adapter_config.json"),
    "alpha 0": ({"settings": {"lora_alpha": 0}}, "lora_alpha=0"),
    "another rank than its tensors'": ({"settings": {"r": 4}}, r"has shape \[8, 256\] where the model and r=4"),
    "a rank beyond vLLM's": ({"rank": 513}, "rank 513; .* 512 at most"),
    "other targets than its tensors'": ({"settings": {"target_modules": ["q_proj"]}}, "have no place in the model"),
    "targets that the model lacks": ({"rename": lambda n: n.replace("q_proj", "wq")}, "have no place in the model"),
    "a tensor that is missing": (
        {"rename": lambda n: None if n.endswith("0.self_attn.q_proj.lora_B.weight") else n},
        "1 of the 28 LoRA tensors that its adapter_config.json promises are not in its file",
    ),
    "another model's shapes": ({"shapes": WIDE}, "has shape .* where the model .* MODEL is"),
    "another method": ({"settings": {"peft_type": "IA3"}}, "peft_type=IA3"),
    "DoRA": ({"settings": {"use_dora": True}}, "use_dora=True"),
    "ranks by layer": ({"settings": {"rank_pattern": {"q_proj": 4}}}, "rank_pattern"),
    "an initialization that moved the base": ({"settings": {"init_lora_weights": "pissa"}}, "pissa"),
    "no LoRA tensors": ({"rename": lambda n: n.replace("lora_", "x_")}, "none of the 28 tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused(model, write_adapter, tmp_path, case):
    arguments, message = REFUSED[case]
    folder = tmp_path / "a"
    if arguments:
        write_adapter(folder, **arguments)
    with pytest.raises(EvaluationError, match=message) as error:
        check_adapters([str(folder)], model.folder)
    assert all(problem.startswith(f"--adapter {folder}: ") for problem in error.value.problems)


def test_all_problems_of_all_adapters_come_at_once(model, write_adapter, tmp_path):
    bad = write_adapter(tmp_path / "a", settings={"r": 0, "lora_alpha": 0})
    good = write_adapter(tmp_path / "b")
    with pytest.raises(EvaluationError) as error:
        check_adapters([str(bad), str(good), str(tmp_path / "c"), str(good)], model.folder)
    problems = error.value.problems
    assert len(problems) == 4 and "given twice" in problems[-1]


def test_a_checkpoint_of_another_base_is_refused(model, bf16_checkpoint, write_adapter, tmp_path):
    """The record of the arm bf16 has the arm's name before the hash."""
    base = fingerprint(bf16_checkpoint, tmp_path / "cache")
    step = checkpoint(tmp_path / "global_step_1", write_adapter, f"bf16-{base}")
    adapters = check_adapters([str(step)], model.folder)
    with pytest.raises(EvaluationError, match=f"other weights than .*{base}.*{model.fingerprint}.*--other-base"):
        check_bases(adapters, model)
    check_bases(adapters, find_model(str(bf16_checkpoint), tmp_path / "cache"))
    # it records none
    check_bases(check_adapters([str(write_adapter(tmp_path / "plain"))], model.folder), model)


def test_broken_files_are_refused(model, write_adapter, tmp_path):
    folder = write_adapter(tmp_path / "a")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        broken = shutil.copytree(folder, tmp_path / file)
        (broken / file).write_bytes((broken / file).read_bytes()[:40])
        with pytest.raises(EvaluationError, match=f"--adapter {broken}: "):
            check_adapters([str(broken)], model.folder)
