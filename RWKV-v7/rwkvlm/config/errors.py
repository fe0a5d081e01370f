"""The one kind of error that a user of the command line can cause; and how one of memory is known."""

import sys


class UserError(ValueError):
    """Bad input: one line that says what is wrong, the value, and the cure. The CLI prints it and exits with code 2."""


def out_of_memory(error: BaseException) -> bool:
    """Whether it says so. Those of torch are known by name or text: it may not have been imported, and on a CPU has no class for them."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def pip_install(package: str) -> str:
    """The command that installs a package for this Python; the pip on the PATH is another one's where .venv is not activated."""
    return f"{sys.executable} -m pip install {package}"
