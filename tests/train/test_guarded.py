"""A guarded process ends with the block and with the process that has started it; its folder goes with that one."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from rwkvlm.train.guarded import guarded

TWO = ["sh", "-c", 'echo $$ > "$1/pids"; sleep 600 & echo $! >> "$1/pids"; wait', "sh"]  # a process and one that it has started
STARTER = """
import sys, time
from rwkvlm.train.guarded import guarded
with guarded(sys.argv[2:], sys.argv[1]):
    time.sleep(600)
"""

KILLED_AT = """
import os, signal, subprocess
def counted(real):
    calls = 0
    def run(*args, **more):
        nonlocal calls
        calls += 1
        if calls == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **more)
    return run
where = subprocess if call == "Popen" else os
setattr(where, call, counted(getattr(where, call)))
"""


def running(text: str) -> bool:
    """Has any process this in its command line?"""
    found = False
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found = found or (text.encode() in path.read_bytes() and alive(int(path.parent.name)))
    return found


def pids(folder: Path) -> list[int]:
    """As soon as both are there."""
    for _ in range(3000):
        if (folder / "pids").exists() and (folder / "pids").read_text().count("\n") == 2:
            return [int(line) for line in (folder / "pids").read_text().splitlines()]
        time.sleep(0.02)
    raise AssertionError("nothing was started")


def alive(pid: int) -> bool:
    """A dead one may wait for somebody to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_it_ends_with_the_one_that_has_started_it(tmp_path, signum):
    folder = tmp_path / "work"
    folder.mkdir()
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(folder), *TWO, str(folder)])
    both = pids(folder)
    os.kill(starter.pid, signum)
    assert starter.wait(10) == -signum
    for _ in range(3000):
        if not folder.exists() and not any(map(alive, both)):
            break
        time.sleep(0.02)
    assert not folder.exists() and not any(map(alive, both))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_at_whatever_moment(tmp_path, at):
    """The starter is killed as soon as the guard is there, or the process too; or when only one of them has been told.

    Nothing runs then, and the folder is gone.
    """
    folder = tmp_path / "work"
    folder.mkdir()
    killed_at = "import sys\ncall, n = {1: ('Popen', 2), 2: ('write', 1), 3: ('write', 2)}[int(sys.argv.pop())]\n" + KILLED_AT
    starter = subprocess.Popen([sys.executable, "-c", killed_at + STARTER, str(folder), *TWO, str(folder), str(at)])
    assert starter.wait(60) == -signal.SIGKILL
    for _ in range(300):
        if not running(str(folder)):  # the guard neither
            break
        time.sleep(0.2)
    assert not folder.exists() and not running(str(folder))


def test_it_ends_with_the_block_and_the_folder_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), guarded([*TWO, str(tmp_path)], str(tmp_path)):
        both = pids(tmp_path)
        1 / 0
    time.sleep(1.5)  # as long as a guard that is left over would take to remove it
    assert not any(map(alive, both)) and tmp_path.exists()
