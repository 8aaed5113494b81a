"""Tests what the switch sets for models with gated delta nets."""

import pytest
from omegaconf import OmegaConf

from qerl_verl.config.delta_nets import STATES, serve_delta_nets
from qerl_verl.config.draft import Draft
from tests.helpers.tiny_families import make_config


@pytest.mark.parametrize(
    ("name", "chosen", "expected"),
    [
        ("Qwen3_5ForCausalLM", None, (False, "float32", False)),
        ("Qwen3_5ForCausalLM", "bfloat16", (False, "bfloat16", False)),
        ("Qwen3ForCausalLM", None, (True, None, True)),
        (None, None, (True, None, True)),
    ],
)
def test_rows_are_padded_and_states_are_the_actors(tmp_path, name, chosen, expected):
    """A model on the hub is left to the checks that follow its download."""
    if name:
        make_config(name).save_pretrained(tmp_path)
    path = str(tmp_path) if name else "Qwen/not-here"
    model = {"path": path, "use_remove_padding": True}
    config = OmegaConf.create({"actor_rollout_ref": {"model": model}, "critic": {"enable": True, "model": dict(model)}})
    if chosen:
        OmegaConf.update(config, STATES, chosen, force_add=True)
    draft = Draft(config)
    serve_delta_nets(draft)
    found = config.actor_rollout_ref.model.use_remove_padding, draft.get(STATES), config.critic.model.use_remove_padding
    assert found == expected
    assert all("delta net" in line for line in draft.lines)
    assert len(draft.lines) == (0 if expected[0] else 2 if chosen else 3)
