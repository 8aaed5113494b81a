"""What keeps two processes from sharing the base."""


class SharingError(RuntimeError):
    """The base cannot be shared; the message is the reason, one line."""
