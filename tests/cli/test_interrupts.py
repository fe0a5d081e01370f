"""Ctrl-C ends a command whatever it is doing, with 130 and without a traceback."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("command", [[str(ROOT / "make_data.py")], ["-m", "rwkvlm", "make_data"]], ids=" ".join)
def test_an_interrupt_reaches_a_command_that_a_shell_put_in_the_background(tmp_path, command):
    """The scripts do, with SIGINT ignored."""
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    argv = [sys.executable, "-c", code, sys.executable, *command, "-", "1", "64", "--out", str(tmp_path / "x")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "x.unfinished" / "lock").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


INTERRUPTED = {
    # torch, from C++, while it is being imported itself: the command would go on, and find no --data_file
    "while torch imports numpy": """
class Finder:
    def find_spec(self, name, *_):
        if name == "numpy":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
cli.main(["train"])
""",
    "when the command has ended": """
cli._command = lambda name: lambda argv: 0
cli.main(["train"])
signal.raise_signal(signal.SIGINT)
""",
}


@pytest.mark.parametrize("when", INTERRUPTED)
def test_an_interrupt_is_neither_lost_nor_a_traceback(when):
    code = f"import signal, sys; from rwkvlm import cli\n{INTERRUPTED[when]}\nsys.exit(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == ""
