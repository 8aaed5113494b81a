"""The vLLM side: NVFP4 layers and the noise in the engine."""
