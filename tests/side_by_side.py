"""--side-by-side: two pytests share the tests, file by file: this one from the first file on, another from the last, until they meet

Most tests keep one core busy. What the other finds is told here, so that one summary, closing line and exit code speak for both; a test of
which neither has told is a failure. Tests marked `alone` measure time or memory: the other pytest waits between two tests meanwhile.
"""

import contextlib
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--side-by-side", action="store_true", help="two pytests share the tests, file by file")
    parser.addoption("--share", metavar="FOLDER", help="what --side-by-side starts the other one with")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.share:
        config.pluginmanager.register(Second(config))
    elif config.option.side_by_side and not config.option.collectonly:
        config.pluginmanager.register(First(config))


class Side:
    """What both sides do: take the next file that is free, and run its tests."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self.config, self.folder = config, folder

    def taken(self, items: list[pytest.Item], backwards: bool) -> Iterator[list[pytest.Item]]:
        """The tests of one file after another."""
        files: dict[str, list[pytest.Item]] = {}
        for item in items:
            files.setdefault(item.nodeid.partition("::")[0], []).append(item)
        for name in reversed(files) if backwards else files:
            try:
                (self.folder / name.replace("/", "|")).touch(exist_ok=False)
            except FileExistsError:
                continue
            yield files[name]

    def run(self, session: pytest.Session, backwards: bool, between: Callable[[], object]) -> None:
        """As pytest's own loop; between: called before each file."""
        files = self.taken(session.items, backwards)
        tests = next(files, [])
        while tests:
            between()
            for item, next_item in zip(tests, tests[1:]):
                self.protocol(item, next_item)
            # The next file is taken here: what a fixture of the whole session has to clear away belongs to a test as well.
            following = next(files, [])
            self.protocol(tests[-1], following[0] if following else None)
            tests = following

    def protocol(self, item: pytest.Item, next_item: pytest.Item | None) -> None:
        with self.floor(item.get_closest_marker("alone") is not None):
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
        if item.session.shouldfail:
            raise item.session.Failed(item.session.shouldfail)
        if item.session.shouldstop:
            raise item.session.Interrupted(item.session.shouldstop)

    @contextlib.contextmanager
    def floor(self, alone: bool) -> Iterator[None]:
        """Shared with the other side's tests or not. Unlocked explicitly: processes that tests fork have the same open files."""
        with open(self.folder / "turn", "w") as turn, open(self.folder / "floor", "w") as floor:
            fcntl.flock(turn, fcntl.LOCK_EX)  # who waits for the floor is the next to have it
            fcntl.flock(floor, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(turn, fcntl.LOCK_UN)
            try:
                yield
            finally:
                fcntl.flock(floor, fcntl.LOCK_UN)


class Second(Side):
    """Runs from the last file on, and writes what it finds where the first reads it."""

    def __init__(self, config: pytest.Config) -> None:
        super().__init__(config, Path(config.option.share))
        self.told, self.parent = open(self.folder / "told", "w", buffering=1), os.getppid()

    def tell(self, *what) -> None:
        self.told.write(pickle.dumps(what).hex() + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.tell("report", self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str, nodeid: str, location: tuple) -> None:
        if when == "runtest":  # of collection the first side knows
            w = warning_message
            self.tell("warning", str(w.message), w.category.__name__, w.filename, w.lineno, nodeid, location)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None  # pytest says which files cannot be collected

        def parent_lives() -> None:
            if os.getppid() != self.parent:
                raise session.Interrupted("the first pytest has ended")

        self.run(session, True, parent_lives)
        return True


class First(Side):
    """Starts the second, runs from the first file on, and reports for both."""

    def __init__(self, config: pytest.Config) -> None:
        self.place = tempfile.TemporaryDirectory(prefix="side-by-side-")
        super().__init__(config, Path(self.place.name))
        self.ended: set[str] = set()  # tests whose last report has come
        (self.folder / "told").touch()
        self.listening = open(self.folder / "told")

    def pytest_sessionstart(self) -> None:
        with open(self.folder / "said", "w") as said:
            command = [sys.executable, "-m", "pytest", *self.config.invocation_params.args, f"--share={self.folder}"]
            self.second = subprocess.Popen(command, cwd=self.config.invocation_params.dir, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        if self.second.poll() is None:  # an error has ended this one: the other clears away what its test has begun
            self.second.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.second.wait(60)
            self.second.kill()

    def pytest_unconfigure(self) -> None:
        self.place.cleanup()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.ended.add(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed and not self.config.option.continue_on_collection_errors:
            return None
        self.run(session, False, self.listen)
        while self.second.poll() is None:
            self.listen()
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            time.sleep(0.2)
        self.listen()
        missing = [item for item in session.items if item.nodeid not in self.ended]
        if missing or self.second.returncode not in (0, 1):
            why = f"the second pytest ended with exit code {self.second.returncode}, not having told of this test:\n{(self.folder / 'said').read_text()[-10000:]}"
            for item in missing or session.items[-1:]:
                self.config.hook.pytest_runtest_logreport(report=pytest.TestReport(item.nodeid, item.location, {}, "failed", why, "call"))
                why = "as the one above"
        return True

    def listen(self) -> None:
        """Hands on what the second has told since the last time."""
        hook = self.config.hook
        while True:
            at = self.listening.tell()
            line = self.listening.readline()
            if not line.endswith("\n"):
                self.listening.seek(at)  # half a line
                return
            kind, *what = pickle.loads(bytes.fromhex(line))
            if kind == "report":
                report = hook.pytest_report_from_serializable(config=self.config, data=what[0])
                if report.when == "setup":
                    hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
                hook.pytest_runtest_logreport(report=report)
                if report.when == "teardown":
                    hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
            else:
                text, category, filename, lineno, nodeid, location = what
                message = warnings.WarningMessage(text, type(category, (Warning,), {}), filename, lineno)
                hook.pytest_warning_recorded.call_historic(kwargs=dict(warning_message=message, when="runtest", nodeid=nodeid, location=location))
