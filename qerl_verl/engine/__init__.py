"""verl's training engines on an NVFP4 base."""
