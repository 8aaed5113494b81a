"""Holds complete verl recipes with the switch.

`python -m verl.trainer.main_ppo --config-path pkg://qerl_verl.recipes --config-name NAME` runs one.
"""
