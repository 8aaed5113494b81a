"""Adds the switch to Hydra's search path where verl's plugins are switched off, so that the switch
can say so. Hydra discovers this module in a regular installation."""

from qerl_verl.config.search_path import QeRLSearchPathPlugin

__all__ = ["QeRLSearchPathPlugin"]
