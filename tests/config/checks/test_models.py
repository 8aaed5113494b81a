"""Model folders on this machine are looked at before anything is quantized."""

import json

import pytest
from omegaconf import OmegaConf
from transformers import Qwen2Config, Qwen2ForCausalLM

from qerl_verl.config.checks import models


@pytest.mark.parametrize(
    ("fused", "tied", "refused"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_fused_kernels_need_a_tied_output_layer(tmp_path, fused, tied, refused):
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    config = OmegaConf.create({"actor_rollout_ref": {"model": {"path": str(tmp_path), "use_fused_kernels": fused}}})
    problems = models.fused_kernel_problems(config)
    assert bool(problems) == refused
    assert not refused or "use_fused_kernels=True" in problems[0]


def test_verl_still_shards_an_untied_output_layer_by_itself():
    """Why fused kernels are refused on such a model; when this fails, the refusal can go."""
    from verl.utils.fsdp_utils import _select_fsdp2_wrap_targets

    def wrapped(tied):
        settings = Qwen2Config(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
            vocab_size=16, tie_word_embeddings=tied,
        )  # fmt: skip
        model = Qwen2ForCausalLM(settings)
        return model.lm_head in _select_fsdp2_wrap_targets(model, ["Qwen2DecoderLayer"])

    assert wrapped(tied=False) and not wrapped(tied=True)
