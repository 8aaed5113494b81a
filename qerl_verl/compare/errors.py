"""What the user of ``qerl compare`` can put right."""


class CompareError(ValueError):
    """The runs cannot be read, or cannot be compared; the message says which and what to do."""
