"""The error type for mistakes that the user can correct."""

LONGEST = 300  # characters of a message: it may quote a value of any size


class UserError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do.

    A longer message loses its middle, and characters that a terminal could act on are escaped.
    """

    def __init__(self, message: object):
        line = " ".join(str(message).splitlines())
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        if len(line) > LONGEST:
            cut = LONGEST - 5 - 100
            line = f"{line[:cut]} ... {line[-100:]}"
        super().__init__(line)
