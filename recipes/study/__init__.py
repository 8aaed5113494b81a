"""Holds the study of what 4 bits and the noise do to RL.

Its arms are recipes. ``python -m qerl_verl.recipes.study`` prepares data and model, runs arms and
seeds side by side, and evaluates the adapters.
"""
