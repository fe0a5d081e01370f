"""A process that does not outlive the one that has started it, whatever ends that."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A shell reads from a pipe whose other end nobody else has: it closes with this process, by kill -9 too.
GUARD = """trap "" TERM; read _; kill -s KILL -- "-$1"; sleep 1; rm -rf -- "$2" """


@contextmanager
def guarded(argv: list[str], folder: str, **more) -> Iterator[subprocess.Popen]:
    """Runs argv in a session of its own; it and all that it has started are killed at the end of the block.

    When this process dies before, they are killed as well, and the folder, in which they work, is removed.
    """
    process = subprocess.Popen(argv, start_new_session=True, **more)
    nowhere = subprocess.DEVNULL
    guard = subprocess.Popen(["sh", "-c", GUARD, "sh", str(process.pid), folder], stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)  # asked politely, a training would save its state first
        process.wait()
        guard.kill()
        guard.communicate()
