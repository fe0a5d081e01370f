"""A subprocess that is killed when its parent ends, whatever ends the parent."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Two shells that read from pipes of which only this process has the writing end: they see the end of the file when it
# dies, even by kill -9. The guard reads the process group to kill and then waits for that end; the command starts when
# it is told that the guard has been given the group, and not at all if this process dies before.
GUARD = """trap "" TERM; read -r pid; read -r _; kill -s KILL -- "-$pid"; sleep 1; rm -rf -- "$1" """
START = 'read -r _ && exec "$@"'


@contextmanager
def guarded(argv: list[str], folder: str, **more) -> Iterator[subprocess.Popen]:
    """Runs argv in a session of its own; it and all that it has started are killed at the end of the block.

    When this process dies before, they are killed as well, and the folder, in which they work, is removed.
    """
    nowhere = subprocess.DEVNULL
    guard = subprocess.Popen(
        ["sh", "-c", GUARD, "sh", folder], stdin=subprocess.PIPE, stdout=nowhere, stderr=nowhere, start_new_session=True
    )
    process = subprocess.Popen(["sh", "-c", START, "sh", *argv], stdin=subprocess.PIPE, start_new_session=True, **more)
    os.write(guard.stdin.fileno(), b"%d\n" % process.pid)
    os.write(process.stdin.fileno(), b"\n")
    process.stdin.close()
    process.stdin = None  # it reads nothing else
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)  # asked politely, a training would save its state first
        process.wait()
        guard.kill()
        guard.communicate()
