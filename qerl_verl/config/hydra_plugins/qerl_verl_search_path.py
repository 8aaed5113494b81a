"""Discovered by Hydra in a regular installation, where verl's plugins are switched off, so that the
switch can say so."""

from qerl_verl.config.search_path import QeRLSearchPathPlugin

__all__ = ["QeRLSearchPathPlugin"]
