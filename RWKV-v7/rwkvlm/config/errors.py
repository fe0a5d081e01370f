"""The one kind of error that a user of the command line can cause."""

import sys


class UserError(ValueError):
    """Bad input: one line that says what is wrong, the value, and the cure. The CLI prints it and exits with code 2."""


def pip_install(package: str) -> str:
    """The command that installs a package for this Python; the pip on the PATH is another one's where .venv is not activated."""
    return f"{sys.executable} -m pip install {package}"
