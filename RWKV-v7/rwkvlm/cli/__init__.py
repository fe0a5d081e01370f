"""The command line: `python -m rwkvlm <command> ...`, where each module of this folder with a `main(argv) -> int` is a command.

Nothing heavy is imported here, so that errors in flags and small commands answer at once.
"""

from __future__ import annotations

import ast
import difflib
import errno
import importlib
import io
import os
import re
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

from ..config import UserError, env
from ..config.errors import out_of_memory

MACHINE_ERROR, USAGE_ERROR = 1, 2
UNSEEN = {errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG}  # there even the question whether a file exists is an error
REQUIRED = {"torch", "deepspeed", "pytorch_lightning", "numpy", "orjson", "tokenizers"}  # what requirements.txt brings and commands import
INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as shells count


def commands() -> dict[str, str]:
    """Names of the commands with what they are for: the first line of their documentation behind the call, read without importing them."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text())
        if path.stem != "__init__" and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0].partition("`: ")[2]
    return found


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code of the process: 2, with one line on stderr, for what the user did wrong."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m rwkvlm <command> [flags]        (<command> --help lists its flags)\n")
        for name, line in commands().items():
            print(f"  {name:12} {line}")
        return 0 if argv else USAGE_ERROR
    before = signal.getsignal(signal.SIGINT)
    # Ignored: as a shell starts a background command. Only the main thread may ask for signals.
    hears = before in (signal.SIG_IGN, signal.default_int_handler) and threading.current_thread() is threading.main_thread()
    try:
        if hears:
            signal.signal(signal.SIGINT, _interrupt)
        _open_what_is_closed()
        env.let_waiting_threads_sleep()
        env.limit_threads()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # commands show texts of any language on terminals of any encoding
        if isinstance(sys.stderr, io.TextIOWrapper):
            # lines whole, with PYTHONUNBUFFERED too: the processes of a run say things at the same moment
            sys.stderr.reconfigure(line_buffering=True, write_through=False)
        code = _command(argv[0])(argv[1:])
        sys.stdout.flush()  # at exit a disk that is full would be a traceback
        return code
    except UserError as error:
        return _refused(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` for example, has enough
        _drop_what_cannot_be_written()
        return BROKEN_PIPE
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None and error.errno in UNSEEN:
            return _refused(f"{error.filename}: {error.strerror}; check the name and its permissions")
        if lacking := _lacking(error):
            _drop_what_cannot_be_written()
            return _refused(lacking, MACHINE_ERROR)
        raise
    finally:
        if hears:
            signal.signal(signal.SIGINT, before)


def run(argv: list[str] | None = None) -> NoReturn:
    """`main` as the whole of a process: an interrupt behind it ends the process without a traceback."""
    code = main(argv)
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt; the end of the process while torch is imported, before any work.

    It imports numpy from C++, and takes an exception for a sign that there is none: a Ctrl-C would be lost, or end in numpy's traceback.
    """
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "torch":
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


def _lacking(error: Exception) -> str:
    """What the machine has too little of, or what its Python lacks, with the cure; "" for any other error."""
    told = str(error).partition("\n")[0]
    if out_of_memory(error):
        return f"out of memory{': ' * bool(told)}{told}; free some, or give the command less at a time (its --help says how)"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"cannot write {error.filename or 'standard output, or a file'}: {error.strerror}; "
            "free some space, or choose another place, then start again"
        )
    # a write to a slow reader raises it too, but with characters_written
    no_process = isinstance(error, BlockingIOError) and not hasattr(error, "characters_written")
    no_thread = "can't start new thread" in told or told == os.strerror(errno.EAGAIN)  # the second: of C++, as gloo starts its threads
    if no_thread or no_process:
        return (
            f"no further thread or process may be started ({told}); "
            "raise the limit (ulimit -u, or the container's limit of pids), or set OMP_NUM_THREADS=1"
        )
    cure = "use .venv/bin/python, which ./test.sh and the demo scripts make, or pip install -r requirements.txt"
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIRED:  # `python train.py`, as officially, beside the .venv
        return f"{sys.executable} has no {error.name}; {cure}"
    # the same in an environment of the official trainer, which wants Lightning 1.9.5
    if isinstance(error, (ImportError, AttributeError, TypeError)):
        with suppress(Exception):  # a damaged environment, odd objects at hand: then the error itself has to say it
            from .doctor import unmet

            others = [line for line in unmet() if "(installed: " in line]
            if not isinstance(error, ImportError):
                others = [line for line in others if re.match(r"[\w-]+", line)[0].replace("-", "_") in _at_hand(error)]
            if others:
                return f"{sys.executable} has other versions than are needed: {', '.join(others)}; {cure} ({type(error).__name__}: {told})"
    return ""


def _at_hand(error: Exception) -> set[str]:
    """The packages where the error was raised: that of the code itself, and those of what is in its variables.

    Of the versions of others the error is no sign.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    values = [*frame.f_globals.values(), *frame.f_locals.values()]
    modules = [
        frame.f_globals.get("__name__"),
        *(getattr(x, "__name__" if isinstance(x, ModuleType) else "__module__", None) for x in values),
    ]
    return {name.partition(".")[0] for name in modules if isinstance(name, str)}


def _drop_what_cannot_be_written() -> None:
    """What standard output still holds, where nobody takes it: Python would try again at exit, complain, and end with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_what_is_closed() -> None:
    """Opens /dev/null in the place of standard input, output or error that the caller has closed (`>&-`).

    Otherwise the next file that is opened would get its number, and what C libraries print would end up in that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def _refused(why: str, code: int = USAGE_ERROR) -> int:
    print(f"error{'' if env.first_process() else ' in another process'}: {why}", file=sys.stderr, flush=True)
    return code


def _command(name: str):
    module = name.replace("-", "_")
    known = commands()
    if module not in known:
        close = difflib.get_close_matches(module, known, 1)
        raise UserError(f"unknown command {name!r}; {f'did you mean {close[0]}?' if close else 'choose one of: ' + ', '.join(known)}")
    return importlib.import_module(f"{__name__}.{module}").main
