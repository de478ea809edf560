"""The error type for mistakes that the user can correct."""


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do."""
