"""Defines the error of a base that cannot be shared."""


class SharingError(RuntimeError):
    """The base cannot be shared. The message is the reason, one line."""
