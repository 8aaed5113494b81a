"""The study of what 4 bits and the noise do to RL: its arms as recipes, and
``python -m qerl_verl.recipes.study``, which prepares data and model, runs arms and seeds side by
side, and evaluates the adapters."""
