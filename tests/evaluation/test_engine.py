"""Tests what an evaluation asks of vLLM, without starting it."""

import pytest

from qerl_verl.evaluation.engine import Engine, EngineSettings
from qerl_verl.evaluation.policies import Model
from qerl_verl.rollout.rope import rope_overrides
from tests.helpers.tiny_families import make_config


@pytest.mark.parametrize("form", ["nvfp4", "bf16"])
def test_positions_are_those_of_the_rollout(tmp_path, form):
    make_config("Ministral3ForCausalLM").save_pretrained(tmp_path)
    engine = Engine.__new__(Engine)
    engine._model, engine._inline = Model(str(tmp_path), tmp_path, form, ""), form == "nvfp4"
    overrides = engine._arguments([], EngineSettings(), on_cpu=True)["hf_overrides"]
    assert overrides == rope_overrides(make_config("Ministral3ForCausalLM")) != {}
