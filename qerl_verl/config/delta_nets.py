"""The settings that a model with gated delta nets needs, whose layers carry a state from token to
token."""

from __future__ import annotations

from qerl_verl.config.checks.models import local_architecture
from qerl_verl.config.draft import Draft
from qerl_verl.config.rules import MODEL, ROLLOUT, trained_models

WHY = (
    "a delta net's state would run from one sequence of a packed row into the next; in padded rows "
    "each sequence begins with an empty state"
)

STATES = f"{ROLLOUT}.engine_kwargs.vllm.mamba_ssm_cache_dtype"
"""vLLM's dtype of the states between two steps."""


def serve_delta_nets(draft: Draft) -> None:
    """Sets ``use_remove_padding=False`` for the models on this machine that have delta nets, and
    ``mamba_ssm_cache_dtype=float32`` for the rollout, unless the user chose another dtype.

    verl hands the borders of packed sequences to ``Qwen3_5ForConditionalGeneration`` alone
    (verl/workers/engine/fsdp/transformer_impl.py, ``pass_packed_cu_seqlens``), and transformers'
    delta net reads them from another argument (``cu_seq_lens_q``), which its fallback without
    flash-linear-attention ignores. The actor computes the states in float32; vLLM goes by
    ``mamba_ssm_dtype`` in config.json, and keeps them in 16 bits where that says nothing.

    Args:
        draft: after the rules (:mod:`qerl_verl.config.rules`). A model that is still to be
            downloaded is refused afterwards, by
            :func:`~qerl_verl.config.checks.models.packing_problems`.
    """
    for model in trained_models(draft.config):
        architecture = local_architecture(draft.config, model)
        if architecture is not None and architecture.delta_nets and draft.get(f"{model}.use_remove_padding"):
            draft.set(f"{model}.use_remove_padding", False, WHY)
        if model == MODEL and architecture is not None and architecture.delta_nets and draft.get(STATES) is None:
            draft.set(STATES, "float32", "the actor computes the states of delta nets in float32")
