"""Exceptions whose text is meant for the user."""

NOT_FINITE = "The loss is not finite"
"""How the sentence of a run begins whose loss became NaN or infinite."""


class UserError(Exception):
    """An error whose text is a plain sentence that names the problem and the fix."""


class MemoryExhaustedError(UserError):
    """The device has too little memory, whatever is given up."""
