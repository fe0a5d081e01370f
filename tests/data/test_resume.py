"""make_data.py killed at any moment: the next run goes on, and its files are those of a run that nobody disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkvlm.cli import main as cli
from rwkvlm.data import documents, pack, unfinished

# Saves after every block, and slowly, so that kills meet all stages: (blocks read, portions written) are counted in a file.
PROGRAM = """
import sys, time
from rwkvlm.data import documents, pack, shuffle, unfinished
documents.BLOCK, unfinished.SAVE_EVERY = 20_000, 0
unfinished.LEAF, shuffle.LEAF, shuffle.BLOCK, shuffle.PORTION = 10_000, 40_000, 30_000, 10_000
read = pack.read_blocks
def slow(*a):
    for block in read(*a):
        with open("trace", "a") as file:
            print(block.file, block.line, file=file)
        time.sleep(0.01)
        yield block
pack.read_blocks = slow
from rwkvlm.cli import main
sys.exit(main(["make_data", *sys.argv[1:]]))
"""
CALL = ["a.jsonl", "b.jsonl.gz", "2", "16", "--out", "x", "--val_split", "0.1", "--skip_bad", "--workers", "2"]
MADE = ["x.bin", "x.idx", "x.val.bin", "x.val.idx"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    import gzip

    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choice(["sun", "moon", "中文"]) for _ in range(rng.randrange(200)))}) for _ in range(1500)]
    lines[700] = "bad"
    Path("a.jsonl").write_text("\n".join(lines[:1000]))
    Path("b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[1000:]).encode()))
    return tmp_path


def start():
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *CALL], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def content():
    return [Path(name).read_bytes() for name in MADE]


@pytest.mark.slow
def test_twenty_kills(here):
    begin = time.monotonic()
    undisturbed = start()
    out, _ = undisturbed.communicate()
    whole, took = content(), time.monotonic() - begin
    assert undisturbed.returncode == 0 and "skipped 1 bad inputs:\n  a.jsonl, line 701: " in out
    blocks = len(Path("trace").read_text().splitlines())
    rng = random.Random(1)
    killed = resumed = 0
    while killed < 20:
        for name in MADE:
            Path(name).unlink(missing_ok=True)
        Path("trace").unlink(missing_ok=True)
        for _ in range(rng.randrange(1, 4)):  # one run is killed up to three times
            process = start()
            time.sleep(rng.uniform(0.2, 1.05) * took)
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            process.stdout.close()
        process = start()
        out, _ = process.communicate()
        assert process.returncode == 0, out
        assert content() == whole and "skipped 1 bad inputs:\n  a.jsonl, line 701: " in out
        assert not [*Path().glob("*.unfinished"), *Path().glob("*.partial")]
        resumed += len(Path("trace").read_text().splitlines()) < 2 * blocks
    assert resumed > 3


def test_an_interrupted_run_goes_on_where_it_stopped(here, monkeypatch, capsys):
    monkeypatch.setattr(documents, "BLOCK", 20_000)
    assert cli(["make_data", *CALL]) == 0
    whole = content()
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    read, limit, seen = pack.read_blocks, 12, []

    def interrupted(*arguments):
        for block in read(*arguments):
            seen.append((block.file.name, block.line))
            if len(seen) == limit:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(pack, "read_blocks", interrupted)
    assert cli(["make_data", *CALL]) == 130
    assert "interrupted; the same command goes on where this one stopped (or remove x.unfinished)" in capsys.readouterr().err
    first, limit = len(seen), 0
    assert cli(["make_data", *CALL]) == 0
    assert content() == whole and seen[first] > seen[0] and not Path("x.unfinished").exists()


@pytest.mark.parametrize("change", ["input", "key", "damage", "cut"])
def test_other_work_is_not_taken_up(here, monkeypatch, change):
    monkeypatch.setattr(documents, "BLOCK", 20_000)
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    encoded = pack._encoded

    def interrupted(*arguments):
        for k, block in enumerate(encoded(*arguments)):
            if k == 8:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(pack, "_encoded", interrupted)
    assert cli(["make_data", *CALL]) == 130
    folder = Path("x.unfinished")
    if change == "input":
        os.utime("a.jsonl", (1, 1))
    elif change == "damage":
        (folder / "progress.json").write_text((folder / "progress.json").read_text()[:100])
    elif change == "cut":
        os.truncate(folder / "all.tokens", 10)
    monkeypatch.setattr(pack, "_encoded", encoded)
    call = [*CALL, "--text_key", "other"] if change == "key" else CALL
    assert cli(["make_data", *call]) == (2 if change == "key" else 0)
    if change != "key":
        made = content()
        assert cli(["make_data", *CALL]) == 0 and content() == made


def test_two_processes_do_not_share_the_work(here, capsys):
    import fcntl

    Path("x.unfinished").mkdir()
    lock = os.open("x.unfinished", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert cli(["make_data", *CALL]) == 2
    assert "another process works in x.unfinished; wait for it, or choose another --out" in capsys.readouterr().err
    os.close(lock)
    assert cli(["make_data", *CALL]) == 0
