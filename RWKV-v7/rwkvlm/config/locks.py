"""Locks between processes: the kernel drops those of a process that dies, so that what a killed one leaves behind blocks nobody."""

from __future__ import annotations

import fcntl
from typing import IO


def try_lock(file: IO) -> bool:
    """Lock a file that is open for writing (NFS wants that), until it is closed. False: another process has it.

    True also on a file system without locks: there two processes can only be told apart by what they write, which must be renamed into
    place as a whole anyway.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
