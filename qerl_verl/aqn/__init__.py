"""Implements Adaptive Quantization Noise: the schedule, the draw and the norms that receive it."""
