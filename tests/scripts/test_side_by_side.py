"""Two pytests that share tests: one report and one exit code for both, and a test that one of them did not bring to its end is a failure"""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
COMMON = """
import os, time, pytest
from pathlib import Path
here = Path(__file__).parent
def note(what):
    with open(here / "log", "a") as log:
        log.write(f"{what} {os.getpid()}\\n")
def wait_for(what):
    until = time.monotonic() + 60
    while what not in ((here / "log").read_text() if (here / "log").exists() else ""):
        assert time.monotonic() < until
        time.sleep(0.01)
"""
FIRST = """
def test_beside_the_last_file():
    wait_for("last begins")
    time.sleep(0.5)
    note("first ends")
def test_fails():
    note("next begins")
    assert not "in the first"
"""
MIDDLE = "def test_nothing(): pass\n"
LAST = """
def test_beside_the_first_file():
    note("last begins")
@pytest.mark.alone
def test_alone():
    note("alone begins")
    time.sleep(0.2)
    note("alone ends")
def test_fails():
    print("heard", "of the second")
    assert not "in the second"
@pytest.mark.skip(reason="as told")
def test_skipped(): pass
"""


def share(folder: Path, last: str) -> tuple[int, str]:
    """Exit code and output of a pytest that shares three files."""
    (folder / "pyproject.toml").write_text(f'[tool.pytest.ini_options]\npythonpath = ["{TESTS}"]\naddopts = "-ra"\nmarkers = ["alone: ."]\n')
    (folder / "conftest.py").write_text("from side_by_side import pytest_addoption, pytest_configure\n")
    for name, text in (("first", FIRST), ("middle", MIDDLE), ("third", last)):
        (folder / f"test_{name}.py").write_text(COMMON + text)
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--side-by-side"], cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_one_report_for_both_and_some_run_alone(tmp_path):
    code, said = share(tmp_path, LAST)
    assert code == 1 and "2 failed, 4 passed, 1 skipped" in said.splitlines()[-1], said
    for line in ("FAILED test_first.py::test_fails", "FAILED test_third.py::test_fails", "heard of the second", "SKIPPED [1] test_third.py", "as told"):
        assert said.count(line) == 1, said
    log = dict(line.rsplit(" ", 1) for line in (tmp_path / "log").read_text().splitlines())
    events = list(log)
    assert events.index("first ends") < events.index("alone begins") and log["first ends"] != log["last begins"], events
    between = events[events.index("alone begins") : events.index("alone ends")]
    assert between == ["alone begins"], events


@pytest.mark.parametrize("end, code", [("os._exit(9)", 9), ("os.kill(os.getpid(), 15)", -15)], ids=["exit", "signal"])
def test_what_the_other_did_not_bring_to_its_end_is_a_failure(tmp_path, end, code):
    status, said = share(tmp_path, LAST.replace('note("alone begins")', end))
    assert status == 1 and "4 failed, 3 passed" in said.splitlines()[-1], said
    assert said.count(f"the second pytest ended with exit code {code}, not having told of this test") >= 1 and "FAILED test_third.py::test_alone" in said, said
