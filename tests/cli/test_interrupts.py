"""Ctrl-C ends a command with 130 and without a traceback, and one that comes behind the command is none either."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rwkvlm import cli

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


IMPORTING = """
import signal, sys
from rwkvlm import cli
class Finder:
    def find_spec(self, name, *_):
        if name == "numpy":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.exit(cli.main(["train"]))
"""


def test_an_interrupt_while_torch_imports_numpy_is_not_lost():
    """From C++, where it is taken for a missing numpy: the command would go on, and find no --data_file."""
    done = subprocess.run([sys.executable, "-c", IMPORTING], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == ""


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_what_an_interrupt_does_is_as_before_when_a_command_has_ended(monkeypatch, before):
    def interrupted(argv):
        signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(cli, "_command", lambda name: interrupted)
    monkeypatch.setattr(cli.env, "limit_threads", lambda: None)
    signal.signal(signal.SIGINT, before)
    assert cli.main(["made up"]) == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_while_python_shuts_down_is_no_traceback():
    code = (
        "import atexit, signal; from rwkvlm import cli; cli._command = lambda name: lambda argv: 0\n"
        "atexit.register(signal.raise_signal, signal.SIGINT); cli.run(['made up'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


def test_a_command_may_run_in_a_thread(monkeypatch):
    """Which may not ask for signals; train and chat do."""
    codes = []
    monkeypatch.setattr(cli, "_command", lambda name: lambda argv: 7)
    monkeypatch.setattr(cli.env, "limit_threads", lambda: None)
    thread = threading.Thread(target=lambda: codes.append(cli.main(["made up"])))
    thread.start()
    thread.join(60)
    assert codes == [7]
