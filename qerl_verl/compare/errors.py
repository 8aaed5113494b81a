"""Defines the error of comparisons, which the user can fix."""


class CompareError(ValueError):
    """The runs cannot be read or compared. The message names them and the fix."""
