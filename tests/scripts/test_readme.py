"""The README is true: every file is in its map, its commands exist, its knobs are those of the scripts."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from rwkvlm.cli import commands

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SCRIPTS = "".join((ROOT / name).read_text() for name in ("demo-training-prepare.sh", "demo-training-run.sh", "RWKV-v7/env.sh"))


def files():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
    records = {name.rsplit("/", 1)[0] + "/README.md" for name in names if name.startswith("records/")}  # which says what lies beside it
    return sorted(records | {name for name in names if not name.startswith("records/")})


def mapped():
    """Paths of the map: a heading names a folder, a line below it a file in it."""
    folder, found = "", []
    for line in README[README.index("\n## Map\n") :].splitlines():
        if heading := re.match(r"\*\*`(.*)`\*\*$", line):
            folder = heading[1].removeprefix("./")
        elif entry := re.match(r"- `([^`]+)`: (.+)$", line):
            found.append((folder + entry[1], entry[2]))
    return found


def test_the_map_has_every_file_and_only_files_that_exist():
    names = [name for name, _ in mapped()]
    assert len(names) == len(set(names))
    missing = sorted(set(files()) - set(names))
    assert not missing, f"in the repository, not in the README's map: {missing}"
    assert not [name for name in names if not (ROOT / name).exists()]


def test_every_line_of_the_map_says_something():
    for name, line in mapped():
        assert len(line) >= 10, name


def code():
    """Lines of the indented blocks: what a reader would type or see."""
    return [line[4:] for line in README.splitlines() if line.startswith("    ")]


def test_commands_exist():
    typed = [line.split("#")[0] for line in code() if re.match(r"(\S+=\S* )*(\./|\.venv/bin/python )", line)]
    assert len(typed) >= 5
    for line in typed:
        for script in re.findall(r"\./([\w.-]+\.sh)", line):
            assert os.access(ROOT / script, os.X_OK), line
        for script in re.findall(r"python (\S+\.py)", line):
            assert (ROOT / script).is_file(), line
    for command in re.findall(r"-m rwkvlm (\w+)", README):
        assert command in commands(), command


def test_knobs_are_those_of_the_scripts():
    table = README[README.index("\n## Knobs\n") : README.index("\n## Your own text")]
    named = {knob for row in re.findall(r"^\| (`.*?) \|", table, re.M) for knob in re.findall(r"`(\w+)`", row)}
    knobs = set(re.findall(r"^knob (\w+)", SCRIPTS, re.M)) | {"PROJ_DIR", "ACCELERATOR", "PYTHON", "TORCH_INDEX_URL"}
    assert knobs <= named
    defaults = {words[1]: words[2:4] for words in (shlex.split(line, comments=True) for line in SCRIPTS.splitlines() if line.startswith("knob "))}
    for row in re.findall(r"^\| (`.*)$", table, re.M):
        names, cpu, gpu = (cell.strip() for cell in row.split("|")[:3])
        gpu = cpu if gpu == "the same" else gpu
        for knob, *shown in zip(re.findall(r"`(\w+)`", names), cpu.split(", "), gpu.split(", ")):
            for default, said in zip(defaults.get(knob, ()), shown):
                assert "$" in default or said.partition(" (")[0].strip("`") == default, knob


def test_train_py_flags_named_in_the_text_exist():
    from dataclasses import fields

    from rwkvlm.config import TrainConfig

    known = {f.name for f in fields(TrainConfig)}
    for line in code():
        if "train.py" in line:
            for flag in re.findall(r"--(\w+)", line):
                assert flag in known or flag == "help", flag
