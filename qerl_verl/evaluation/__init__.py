"""``qerl eval``: pass@k of a model and of adapters on it, sampled in the engine that a run's rollout has."""
