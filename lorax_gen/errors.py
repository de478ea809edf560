"""The one error type that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do."""
