"""The version check that decides whether an interpreter may be used: standard library only, metadata only."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "RWKV-v7" / "requirements_met.py"


@pytest.fixture(scope="module")
def script():
    namespace = {"__name__": "requirements_met"}
    exec(compile(SCRIPT.read_text(), SCRIPT, "exec"), namespace)
    return namespace


VERSIONS = [
    "2.10.0",
    "2.10.9",
    "2.11",
    "2.11.0",
    "2.11.0+cu126",
    "2.13.0+cpu",
    "2.9",
    "2.99.1",
    "3",
    "3.0.0",
    "3.0.1",
    "0.19.8",
    "10.0",
    "2026.9.0",
]
SPECIFIERS = [">=2.11,<3", ">=2.11", "<3", ">2.11", "<=2.11", "==2.11", "!=2.11.0", ">= 2.11, < 3.0", ""]


@pytest.mark.parametrize("specifiers", SPECIFIERS)
def test_agrees_with_packaging_on_releases(script, specifiers):
    for version in VERSIONS:
        if specifiers == "<=2.11" and "+" in version:
            continue  # packaging ranks a local version above its release; torch's "+cu126" is the same release to us
        expected = Version(version.partition("+")[0]) in SpecifierSet(specifiers)
        assert script["in_range"](version, specifiers) == expected, (version, specifiers)


def test_pre_releases_are_older_than_their_release(script):
    assert not script["in_range"]("2.11.0a0+5114880", ">=2.11")
    assert script["in_range"]("2.12.0a0+5114880", ">=2.11,<3")
    assert script["in_range"]("2.11.0.post1", ">=2.11")


def test_lines(script):
    assert script["lacking"](["# comment", "", "pytest>=1  # why"]) == []
    assert script["lacking"](["no-such-package>=1"]) == ["no-such-package>=1 (not installed)"]
    assert script["lacking"](["pytest>=999"])[0].startswith("pytest>=999 (installed: ")
    assert script["lacking"](["PyTest", "pytorch_lightning"]) == []
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    for sign, wanted in (("<", False), (">", False), (">=", True), ("==", True)):
        line = f'no-such-package>=1; python_version {sign} "{running}"'
        assert script["lacking"]([line]) == [f"{line} (not installed)"] * wanted


def test_every_requirement_has_a_pinned_version_within_its_range(script):
    pins = [line.partition(";")[0].split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    for name in ("requirements.txt", "tests/requirements.txt"):
        for line in (ROOT / name).read_text().splitlines():
            package, range_from = line.partition(";")[0].split(">=")
            versions = [version for name, version in pins if name == package]
            assert versions and all(script["in_range"](version, ">=" + range_from) for version in versions), line


def test_exit_status_and_no_import_of_torch(tmp_path):
    (tmp_path / "wants").write_text("pytest>=999\nno-such-package\n")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "wants"], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 2 and done.stderr == ""
    probe = (
        "import runpy, sys\nsys.argv.pop(0)\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe, SCRIPT, ROOT / "requirements.txt"], check=True)
