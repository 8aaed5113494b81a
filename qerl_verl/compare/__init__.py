"""Compares training runs: from the metrics that verl logs to curves, tables and intervals.

The package reads files only and imports neither torch, verl nor vLLM.
"""
