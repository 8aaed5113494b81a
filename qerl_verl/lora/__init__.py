"""Applies PEFT's LoRA to NVFP4 layers."""
