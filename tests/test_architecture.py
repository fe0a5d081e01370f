"""The import law and the size law, checked on every file's syntax tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "RWKV-v7" / "rwkvlm"

MAY_IMPORT = {
    "config": set(),
    "native": {"config"},
    "ops": {"config", "native"},
    "layers": {"config", "ops"},
    "models": {"config", "ops", "layers"},
    "data": {"config", "native"},
    "checkpoint": {"config", "models"},
    "train": {"config", "ops", "models", "checkpoint", "data", "infer"},
    "infer": {"config", "ops", "models", "checkpoint", "data"},
    "eval": {"config", "ops", "models", "checkpoint", "data", "infer"},
    "compress": {"config", "ops", "layers", "models", "checkpoint", "data", "train", "eval"},
}
ONLY_IN = {
    "deepspeed": {"train", "checkpoint"},
    "pytorch_lightning": {"train"},
    "lightning": {"train"},
    "wandb": {"train"},
}
PYTHON = sorted(p for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "out" not in p.relative_to(ROOT).parts[:1])
MODULES = [p for p in PYTHON if PACKAGE in p.parents]
SOURCES = sorted(
    p
    for top in ("RWKV-v7", "cuda", "tests", "bench", ".ci")
    for p in (ROOT / top).rglob("*")
    if p.suffix in {".py", ".cu", ".cuh", ".cpp", ".h", ".hpp", ".sh"}
)


def room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imported_modules(path: Path) -> list[str]:
    """Absolute dotted names of everything imported anywhere in the file, function bodies included."""
    package = ["rwkvlm", *path.relative_to(PACKAGE).parent.parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{stem}.{alias.name}" for alias in node.names] if stem in {"rwkvlm", ""} else [stem]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    here = room(path)
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "rwkvlm" and len(parts) > 1 and here not in {"cli", "__init__", "__main__"}:
            target = parts[1]
            if target.startswith("__"):
                continue
            assert target == here or target in MAY_IMPORT[here], f"{here} may not import {target} ({name})"
        if parts[0] in ONLY_IN:
            assert here in ONLY_IN[parts[0]], f"{parts[0]} may be imported only in {sorted(ONLY_IN[parts[0]])}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_environment_is_read_in_one_place(path):
    if path == PACKAGE / "config" / "env.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os":
            assert node.attr not in {"getenv", "getenvb"}, "read the variable in config/env.py"
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
            assert not ast.unparse(node.value).endswith("os.environ"), "read the variable in config/env.py"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("os.environ.get"):
            raise AssertionError("read the variable in config/env.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_above_500_lines(path):
    assert len(path.read_text().splitlines()) <= 500


@pytest.mark.parametrize("path", [p for p in SOURCES if p.suffix not in {".py", ".sh"}], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_line_of_a_native_source_is_longer_than_140_columns(path):
    """Those of Python: ruff, below."""
    assert not [number for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 140]


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_code_is_in_the_style_of_pyproject(command):
    pytest.importorskip("ruff")
    done = subprocess.run([sys.executable, "-m", "ruff", *command.split(), "--no-cache", *PYTHON], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_compiles_or_builds_at_import():
    """native.py is the only module that knows the folder of the kernels."""
    for path in MODULES:
        if room(path) != "native":
            tree = ast.parse(path.read_text())
            strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            assert not any(s.endswith((".cu", ".cpp")) for s in strings), path


def test_no_file_needs_a_newer_python_than_pyproject_asks_for():
    """The grammar alone; on an older interpreter than CI's nobody sees it otherwise."""
    minor = int(re.search(r'^requires-python = ">=3\.(\d+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1])
    for path in PYTHON:
        ast.parse(path.read_text(), str(path), feature_version=(3, minor))


def test_the_law_is_applied_to_something():
    assert len(MODULES) > 10 and len(SOURCES) > 10
