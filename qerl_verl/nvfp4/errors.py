"""Defines the error of checkpoint handling."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, quantized or used.

    The message names the file, tensor or setting, and the fix.
    """
