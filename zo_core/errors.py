"""The one exception whose text is meant for the user."""


class UserError(Exception):
    """An error whose text is a plain sentence that names the problem and the fix."""
