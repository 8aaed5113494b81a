"""Implements the vLLM side: NVFP4 layers, adapters and noise in the engine."""
