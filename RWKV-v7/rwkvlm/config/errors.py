"""The one kind of error that a user of the command line can cause."""


class UserError(ValueError):
    """Bad input: one line that says what is wrong, the value, and the cure. The CLI prints it and exits with code 2."""
