"""Comparison of training runs: from the metrics that verl logs to curves, tables and intervals.

Reads files alone: nothing here imports torch, verl or vLLM.
"""
