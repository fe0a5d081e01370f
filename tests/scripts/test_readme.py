"""The README and RWKV-v7/docs are true: every file is in the map, commands exist, knobs are those of the scripts, links lead somewhere."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from rwkvlm.cli import commands

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "RWKV-v7" / "docs").glob("*.md")))}
FENCED = re.compile(r"^```.*?\n(.*?)^```$", re.M | re.S)
SCRIPTS = "".join((ROOT / name).read_text() for name in ("demo-training-prepare.sh", "demo-training-run.sh", "RWKV-v7/env.sh"))


def tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def files():
    names = tracked()
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
    """Lines of the blocks of code on all pages: what a reader would type or see."""
    return [line for text in PAGES.values() for block in FENCED.findall(text) for line in block.splitlines()]


def shown():
    """Commands in blocks and in running text."""
    inline = re.findall(r"`([^`\n]+)`", "".join(FENCED.sub("", text) for text in PAGES.values()))
    return [line.split("#")[0] for line in code() + inline if re.match(r"(\S+=\S* )*(\./|bench/|(\.venv/bin/)?python )", line)]


def test_every_block_of_code_is_fenced_and_closed():
    """Or code() would not see it. Indented are only the formulas of the page on wkv7."""
    for path, text in PAGES.items():
        assert len(re.findall(r"^```", text, re.M)) == 2 * len(FENCED.findall(text)), path
        assert path.name == "wkv7_chunked.md" or not re.search(r"^    ", FENCED.sub("", text), re.M), path


def test_commands_exist():
    typed = shown()
    assert len(typed) >= 30
    for line in typed:
        for script in re.findall(r"(?:\./|\b)([\w./-]+\.sh)", line):
            assert os.access(ROOT / script, os.X_OK), line
        for script in re.findall(r"python (\S+\.py)", line):
            assert (ROOT / script).is_file(), line
    named = re.findall(r"-m rwkvlm (\w+)", "".join(PAGES.values()))
    assert len(named) >= 10
    for command in named:
        assert command in commands(), command


def names():
    """Paths that git has, their folders too."""
    listed = [Path(name) for name in tracked()]
    return {str(path) for name in listed for path in (name, *name.parents)}


def anchors(text):
    """As GitHub makes them of headings: lower case, spaces become hyphens, punctuation goes, the second of a name has -1."""
    found = []
    for heading in re.findall(r"^#+ +(.+?) *$", FENCED.sub("", text), re.M):
        anchor = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found


def links(text):
    """Targets of links and images outside of code."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]+`", "", FENCED.sub("", text)))


def test_anchors_and_links_are_found():
    page = (
        "# Two words: `--a_b`, c.d\n## Again\n## Again\n[x](one.md) ![y](two.svg)\n[`z`](three.md#four) `[w](5.md)`\n"
        "```sh\n# no heading [v](6.md)\n```\n"
    )
    assert anchors(page) == ["two-words---a_b-cd", "again", "again-1"]
    assert links(page) == ["one.md", "two.svg", "three.md#four"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_tracked_files_and_headings(page):
    there = names()
    for link in links(PAGES[page]):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        file = Path(os.path.normpath(page.parent / target)) if target else page
        assert file.is_relative_to(ROOT) and str(file.relative_to(ROOT)) in there, link
        if anchor:
            assert anchor in anchors(file.read_text()), link


def test_every_record_named_in_the_text_exists():
    for text in PAGES.values():
        for record in re.findall(r"records/([\w-]+)", text):
            assert (ROOT / "records" / record).is_dir(), record


def test_every_page_can_be_reached_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(README[: README.index("\n## Map\n")])}
    assert PAGES.keys() - linked - {ROOT / "README.md", ROOT / "RWKV-v7" / "docs" / "wkv7_chunked.md"} == set()


def test_knobs_are_those_of_the_scripts():
    table = README[README.index("\n## Knobs\n") : README.index("\n## Your own text")]
    named = {knob for row in re.findall(r"^\| (`.*?) \|", table, re.M) for knob in re.findall(r"`(\w+)`", row)}
    knobs = set(re.findall(r"^knob (\w+)", SCRIPTS, re.M)) | {"PROJ_DIR", "ACCELERATOR", "PYTHON", "TORCH_INDEX_URL"}
    assert knobs <= named
    defaults = {
        words[1]: words[2:4] for words in (shlex.split(line, comments=True) for line in SCRIPTS.splitlines() if line.startswith("knob "))
    }
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
    for line in shown():
        if "train.py" in line:
            for flag in re.findall(r"--(\w+)", line):
                assert flag in known or flag == "help", flag


def test_the_page_of_flags_has_every_flag_of_train_py():
    from dataclasses import fields

    from rwkvlm.config import TrainConfig

    page = PAGES[ROOT / "RWKV-v7" / "docs" / "flags.md"]
    assert set(re.findall(r"--(\w+)", page)) - {"help"} == {f.name for f in fields(TrainConfig)}
