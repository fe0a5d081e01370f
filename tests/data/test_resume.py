"""make_data.py killed at any moment: the next run goes on, and its files are those of a run that nobody disturbed."""

import errno
import gzip
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkvlm.cli import main as cli
from rwkvlm.config.locks import try_lock
from rwkvlm.data import binidx, documents, pack, shuffle, unfinished

ZST = importlib.util.find_spec("zstandard") is not None
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
CALL = [
    "a.jsonl",
    "long.txt",
    "b.jsonl.gz",
    *(["c.jsonl.zst"] if ZST else []),
    "2",
    "16",
    "--out",
    "x",
    "--val_split",
    "0.1",
    "--skip_bad",
    "--workers",
    "2",
]
MADE = ["x.bin", "x.idx", "x.val.bin", "x.val.idx"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choice(["sun", "moon", "中文"]) for _ in range(rng.randrange(200)))}) for _ in range(1500)]
    lines[700] = "bad"
    Path("a.jsonl").write_text("\n".join(lines[:1000]))
    Path("b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[1000:1300]).encode()))
    # comes in parts
    Path("long.txt").write_text("".join(rng.choice(["sun", " moon", "中文", "=", "\n"]) * rng.randrange(30) for _ in range(8000)))
    if ZST:
        import zstandard

        Path("c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress("\n".join(lines[1300:]).encode()))
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


@pytest.mark.parametrize("name", ["long.txt", "c.jsonl.zst"])
def test_it_goes_on_inside_a_text_and_inside_a_packed_file(here, monkeypatch, name):
    """An interruption after every so many blocks: each time what has been read is not read again."""
    if name not in CALL:
        pytest.skip("no zstandard")
    monkeypatch.setattr(documents, "BLOCK", 3000)
    call = ["make_data", name, "2", "16", "--out", "x", "--workers", "2"]
    assert cli(call) == 0
    whole = [Path(end).read_bytes() for end in ("x.bin", "x.idx")]
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    save, saves, starts, at_the_end = unfinished.Unfinished.save, [], [], [name == "long.txt"]

    def interrupted(work):
        save(work)
        work._saving.result()
        saves.append((work.progress.at, work.progress.open_parts))
        if len(saves) % 7 == 0 or (at_the_end and work.progress.at == Path(name).stat().st_size and at_the_end.pop()):
            raise KeyboardInterrupt

    read = pack.read_blocks
    monkeypatch.setattr(pack, "read_blocks", lambda *a: starts.append(a[2]) or read(*a))
    monkeypatch.setattr(unfinished.Unfinished, "save", interrupted)
    codes = [cli(call)]
    while codes[-1] == 130:
        codes.append(cli(call))
    assert codes[-1] == 0 and len(codes) > 5
    assert [Path(end).read_bytes() for end in ("x.bin", "x.idx")] == whole
    assert starts[0] == 0 and starts == sorted(set(starts)) and not (name == "long.txt" and at_the_end)
    assert any(parts > 7 for _, parts in saves) == (name == "long.txt")


def test_standard_input_begins_anew(here, monkeypatch, capsys):
    """What was read from it is gone: the work that a killed run left is not taken up, nor does Ctrl-C promise it."""
    text = Path("a.jsonl").read_bytes().replace(b"bad", b"")
    other = text.split(b"\n", 1)[1]  # another text, of which nothing has been read
    (here / "in").write_bytes(other), (here / "other.jsonl").write_bytes(other)
    call = [sys.executable, str(Path(documents.__file__).parents[3] / "make_data.py"), "-", "1", "16", "--out", "x"]
    killed = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *call[2:]], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    killed.stdin.write(text)
    killed.stdin.flush()
    while not Path("x.unfinished/progress.json").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill(), killed.wait(), killed.stdin.close()
    with open("in", "rb") as file:
        assert subprocess.run(call, stdin=file, stdout=subprocess.DEVNULL).returncode == 0
    made = [Path(end).read_bytes() for end in ("x.bin", "x.idx")]
    assert cli(["make_data", "other.jsonl", "1", "16", "--out", "x"]) == 0
    assert [Path(end).read_bytes() for end in ("x.bin", "x.idx")] == made
    with open("a.jsonl", "rb") as file:
        bad = subprocess.run([sys.executable, "-c", PROGRAM, *call[2:]], stdin=file, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.endswith("(--skip_bad passes over such input)\n"), "and nothing of it is kept"
    capsys.readouterr()

    def interrupted(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(pack, "read_blocks", interrupted)
    assert cli(["make_data", "-", "1", "16", "--out", "x"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; what came from standard input is gone, so that nothing is kept\n"
    assert not Path("x.unfinished").exists()


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


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_room(monkeypatch, at):
    """A disk that is full while tokens are written, when the room for the copies is looked at, while they are written, or at their end."""
    if at == "reading":
        flush, calls = shuffle.Pile.flush, []
        monkeypatch.setattr(shuffle.Pile, "flush", lambda pile: no_space() if len(calls) == 6 else calls.append(flush(pile)))
    elif at == "room":
        monkeypatch.setattr(binidx.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    else:
        monkeypatch.setattr(pack.BinIdxWriter, "seal" if at == "sealing" else "add_many", no_space)


@pytest.mark.parametrize("at", ["reading", "room", "writing", "sealing"])
def test_a_full_disk_loses_no_work(here, monkeypatch, capsys, at):
    """The same command goes on with what has been saved; scratch files of the shuffle do not stay beside it."""
    monkeypatch.setattr(documents, "BLOCK", 20_000)
    assert cli(["make_data", *CALL]) == 0
    whole = content()
    for name in MADE:
        Path(name).unlink()
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    read, seen = pack.read_blocks, []
    monkeypatch.setattr(pack, "read_blocks", lambda *a: (seen.append(block) or block for block in read(*a)))
    save = unfinished.Unfinished.save
    monkeypatch.setattr(unfinished.Unfinished, "save", lambda work: (save(work), work._saving.result()))
    with monkeypatch.context() as full:
        no_room(full, at)
        capsys.readouterr()
        assert cli(["make_data", *CALL]) == 2
    said = capsys.readouterr().err
    assert (
        ("and x has" in said or "x needs" in said)
        if at == "room"
        else "No space left on device; free some space and the same command goes on" in said
    )
    assert Path("x.unfinished/progress.json").exists() and not [*Path().glob("x.bin*"), *Path().glob("x.val.*")]
    Path("x.unfinished/pile-0-3.tokens").write_bytes(b"left by a shuffle")
    first = len(seen)
    shuffled = pack.shuffled
    monkeypatch.setattr(
        pack, "shuffled", lambda *a: [*shuffled(*a)] if not Path("x.unfinished/pile-0-3.tokens").exists() else pytest.fail("left")
    )
    assert cli(["make_data", *CALL]) == 0
    assert content() == whole and not Path("x.unfinished").exists()
    assert len(seen) == first if at != "reading" else seen[first].line > 1 or seen[first].file != seen[0].file


def test_bad_input_after_hours_loses_nothing(here, monkeypatch, capsys):
    """--skip_bad goes on where a run without it has stopped.

    Without it again the same input is refused, also if a run with it has passed over it.
    """
    monkeypatch.setattr(documents, "BLOCK", 20_000)
    monkeypatch.setattr(pack, "LISTED", 2)
    lines = Path("a.jsonl").read_text().split("\n")
    Path("a.jsonl").write_text("\n".join([*lines[:900], "bad too", *lines[901:]]))
    call = ["make_data", "a.jsonl", "1", "16", "--out", "x", "--val_split", "0.1"]
    assert cli([*call, "--skip_bad"]) == 0
    whole = content()
    for name in Path().glob("x.*"):
        name.unlink()
    assert cli(call) == 2 and not Path("x.unfinished").exists()
    assert capsys.readouterr().err.endswith("(--skip_bad passes over such input)\n"), "what takes seconds is not kept"
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    refused, write = [], unfinished.Unfinished._write
    monkeypatch.setattr(unfinished.Unfinished, "_write", lambda work, text: (time.sleep(0.1), write(work, text)))  # as on a busy disk
    for _ in range(2):
        assert cli(call) == 2 and Path("x.unfinished/progress.json").exists() and not [*Path().glob("x.bin*")]
        refused.append(capsys.readouterr().err)
    assert refused[0] == refused[1] and refused[0].endswith("(--skip_bad passes over such input, and goes on where this one stopped)\n")
    read, seen, save = pack.read_blocks, [], unfinished.Unfinished.save

    def killed(work):
        save(work)
        work._saving.result()
        if work.progress.skipped >= bad:
            raise KeyboardInterrupt

    monkeypatch.setattr(unfinished.Unfinished, "_write", write)
    monkeypatch.setattr(pack, "read_blocks", lambda *a: (seen.append(block) or block for block in read(*a)))
    for bad in (1, 2):
        with monkeypatch.context() as stopped:
            stopped.setattr(unfinished.Unfinished, "save", killed)
            assert cli([*call, "--skip_bad"]) == 130
        assert len(json.loads(Path("x.unfinished/progress.json").read_text())["progress"]["first_skipped"]) == bad
        assert seen[0].line > 1, "from where the first one stopped"
        capsys.readouterr()
        assert cli(call) == 2 and capsys.readouterr().err == refused[0]
    assert cli([*call, "--skip_bad"]) == 0
    assert content() == whole and not Path("x.unfinished").exists()


def test_a_kill_after_a_bad_document_was_dropped_loses_nothing(here, monkeypatch):
    """Its parts are in what has been saved, and no longer on the disk."""
    monkeypatch.setattr(documents, "BLOCK", 20_000)
    Path("bad.txt").write_bytes(Path("long.txt").read_bytes() + "\U0001f47d".encode() + b"\xff")
    call = ["make_data", "a.jsonl", "bad.txt", "b.jsonl.gz", "1", "16", "--out", "x", "--skip_bad", "--report", "x.json"]
    assert cli(call) == 0
    whole = [Path(name).read_bytes() for name in ("x.bin", "x.idx", "x.json")]
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    save, drop, read, seen = unfinished.Unfinished.save, unfinished.Unfinished.drop_document, pack.read_blocks, []

    def killed(work):
        drop(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(unfinished.Unfinished, "save", lambda work: (save(work), work._saving.result()))
    with monkeypatch.context() as stopped:
        stopped.setattr(unfinished.Unfinished, "drop_document", killed)
        assert cli(call) == 130
    monkeypatch.setattr(pack, "read_blocks", lambda *a: (seen.append(block) or block for block in read(*a)))
    assert cli(call) == 0
    assert [Path(name).read_bytes() for name in ("x.bin", "x.idx", "x.json")] == whole
    assert seen[0].file.name == "bad.txt" and seen[0].line == 1


def test_what_is_tokenised_is_kept_whatever_happens_then(here, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    monkeypatch.setattr(pack, "shuffled", fails)
    assert cli(["make_data", "a.jsonl", "1", "16", "--out", "x", "--skip_bad"]) == 1
    assert Path("x.unfinished/progress.json").exists()


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
    lock = open("x.unfinished/lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert cli(["make_data", *CALL]) == 2
    assert "another process works in x.unfinished; wait for it, or choose another --out" in capsys.readouterr().err
    lock.close()
    assert cli(["make_data", *CALL]) == 0


def test_nobody_else_begins_while_the_folder_is_emptied(here, monkeypatch):
    unlink, seen = Path.unlink, []

    def watched(path, *arguments, **more):
        if path.parent.name == "x.unfinished":
            with open(path.parent / "lock", "w") as file:
                seen.append((path.name, try_lock(file)))
        unlink(path, *arguments, **more)

    monkeypatch.setattr(Path, "unlink", watched)
    assert cli(["make_data", *CALL]) == 0
    assert seen[-1] == ("lock", False) and not any(free for _, free in seen) and not Path("x.unfinished").exists()


def test_a_file_system_without_locks(here, monkeypatch):
    import errno
    import fcntl

    calls = []

    def none(file, how):
        calls.append(how)
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert cli(["make_data", *CALL]) == 0 and {*calls} == {fcntl.LOCK_EX | fcntl.LOCK_NB}
