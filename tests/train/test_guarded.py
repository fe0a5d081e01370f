"""A guarded process ends with the block and with the process that has started it; its folder goes with that one."""

import os
import signal
import subprocess
import sys
import time
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


def pids(folder: Path) -> list[int]:
    """As soon as both are there."""
    for _ in range(500):
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
    for _ in range(500):
        if not folder.exists():
            break
        time.sleep(0.02)
    assert not folder.exists() and not any(map(alive, both))


def test_it_ends_with_the_block_and_the_folder_stays(tmp_path):
    with pytest.raises(ZeroDivisionError), guarded([*TWO, str(tmp_path)], str(tmp_path)):
        both = pids(tmp_path)
        1 / 0
    time.sleep(1.5)  # as long as a guard that is left over would take to remove it
    assert not any(map(alive, both)) and tmp_path.exists()
