"""PEFT's LoRA on NVFP4 layers."""
