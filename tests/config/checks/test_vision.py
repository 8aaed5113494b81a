"""What a model with a vision tower needs, and what the run's data and settings have to be."""

import importlib.util
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from qerl_verl.config.checks import vision
from tests.helpers.tiny_families import YARN, make_config

QWEN2_5, QWEN3 = "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"
MROPE = {"rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
IMAGE = {"bytes": b"", "path": "a.png"}


def problems_of(
    folder,
    name=QWEN3,
    settings=None,
    images=((IMAGE,),),
    actor=None,
    arm="nvfp4",
    attention="sdpa",
    reason=None,
    marks=None,
    column="images",
    *,
    monkeypatch,
):
    """Returns the problems with the packages in place, and a processor that cannot be loaded for
    ``reason``."""
    (folder / "config.json").write_text(json.dumps(make_config(name, **settings or {}).to_dict()))
    asked = marks if marks is not None else [len(row) for row in images]
    columns = {"prompt": [[{"role": "user", "content": "<image>" * n + "what?"}] for n in asked]}
    columns[column] = [list(row) for row in images]
    pq.write_table(pa.table(columns), folder / "train.parquet")
    config = OmegaConf.create({
        "qerl": {"arm": arm},
        "actor_rollout_ref": {"model": {
            "path": str(folder), "use_remove_padding": True, "override_config": {"attn_implementation": attention},
        }, "actor": actor or {}},
        "data": {"train_files": str(folder / "train.parquet"), "image_key": "images"},
    })  # fmt: skip
    monkeypatch.setattr(vision, "_processor_problem", lambda get, folder: reason)
    monkeypatch.setattr(vision, "PACKAGES", {})
    return vision.find_problems(config, folder)


TABLE = [
    ({}, None),
    ({"name": QWEN2_5}, None),
    ({"name": "Qwen2ForCausalLM", "images": [[]], "reason": "not asked"}, None),
    ({"images": [[]]}, None),
    (
        {"name": QWEN2_5, "images": [[IMAGE], []]},
        "row 1 of .*train.parquet has no image. Stock verl .* leave such rows out",
    ),
    ({"images": [[IMAGE, IMAGE], []]}, None),
    ({"column": "image"}, "row 0 .*has <image> in its prompt and nothing in the column images.*data.image_key"),
    ({"images": [[IMAGE], [IMAGE]], "marks": [1, 2]}, "row 1 .*has <image> 2 times in its prompt and 1 images"),
    ({"name": "Qwen2ForCausalLM"}, "has images or videos .* and Qwen2ForCausalLM has no vision tower"),
    ({"settings": {"rope_parameters": MROPE | YARN}}, "rope_type yarn in config.json"),
    ({"settings": {"rope_parameters": MROPE | {"mrope_interleaved": False}}}, "as with True. Set true there"),
    ({"name": QWEN2_5, "settings": {"rope_parameters": MROPE}}, "as with False. Set false there"),
    ({"actor": {"ulysses_sequence_parallel_size": 2}}, None),
    (
        {"name": QWEN2_5, "actor": {"ulysses_sequence_parallel_size": 2}},
        "ulysses_sequence_parallel_size=2: .* set it to 1",
    ),
    (
        {"name": QWEN2_5, "actor": {"fsdp_config": {"ulysses_sequence_parallel_size": 4}}},
        "ulysses_sequence_parallel_size=4",
    ),
    ({"name": QWEN2_5, "actor": {"ulysses_sequence_parallel_size": 2}, "attention": "flash_attention_2"}, None),
    ({"arm": "nf4"}, r"\+qerl=nf4 with Qwen3VL.*use \+qerl=nvfp4 or bf16"),
    ({"arm": "bf16"}, None),
    ({"arm": "bf16", "name": QWEN2_5}, "use_remove_padding=True with .qerl=bf16: .*set it to False"),
    ({"arm": "bf16", "name": QWEN2_5, "attention": "flash_attention_2"}, None),
    ({"reason": "no preprocessor_config.json"}, "no image processor .* \\(no preprocessor_config.json\\)"),
]


@pytest.mark.parametrize(("given", "expected"), TABLE)
def test_what_cannot_run_is_named(tmp_path, monkeypatch, given, expected):
    problems = problems_of(tmp_path, monkeypatch=monkeypatch, **given)
    assert bool(problems) == bool(expected), problems
    if expected:
        (problem,) = problems
        assert re.search(expected, problem), problem


def test_packages_that_are_missing_are_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(make_config(QWEN3).to_dict()))
    config = OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(tmp_path)}}, "data": {}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    problems = vision.find_problems(config, tmp_path)
    expected = [f"{QWEN3} needs {name}: {why}" for name, why in vision.PACKAGES.items()]
    assert len(problems) == 2 and all(e in p for e, p in zip(expected, problems, strict=True))


def test_a_folder_without_a_processor(bf16_checkpoint):
    """A text model's folder has a tokenizer alone, with which verl would go on without images."""
    get = {"actor_rollout_ref.model.tokenizer_path": None}.get
    assert vision._processor_problem(get, bf16_checkpoint)
