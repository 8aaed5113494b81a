"""Implements ``qerl eval``: pass@k of a model and of its adapters, sampled in a rollout's
engine."""
