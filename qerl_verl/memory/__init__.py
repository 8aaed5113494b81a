"""Estimates the GPU and host memory of a run from its configuration (``qerl plan``)."""
