"""One run a folder: who is refused, who is told that the folder is another's now, and what is no obstacle."""

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rwkvlm.config import UserError
from rwkvlm.config.locks import try_lock
from rwkvlm.train import hold, saver
from rwkvlm.train import run as running
from rwkvlm.train.health import Health
from rwkvlm.train.hold import HELD, Hold, last_holder
from rwkvlm.train.logs.metrics import Metrics
from rwkvlm.train.run import PlannedModule

WHO = r"process \d+ on \S+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def refused(out: Path) -> str:
    return rf"another run is writing to {re.escape(str(out))} \({WHO}\); wait for its end or stop it, or choose another --proj_dir"


def test_two_runs_never_write_to_one_folder(run, losses, tmp_path, monkeypatch, capsys):
    """A run has its folder to itself while it trains, and lets go of it: another one is refused before it writes."""
    out, step, free = tmp_path / "out", Metrics.step, []

    def watched(self, record):
        step(self, record)
        with open(out / HELD, "a") as file:
            free.append(try_lock(file))

    monkeypatch.setattr(Metrics, "step", watched)
    assert run(out, max_steps=2) == 0 and free == [False, False]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    with open(out / HELD, "a") as other:
        assert try_lock(other), "the run before has ended"
        for stage in (1, 3):
            assert run(out, train_stage=stage) == 2
        assert run(out, dry_run="True") == 0
        with monkeypatch.context() as late:  # begun at the same moment, before the other one held anything
            late.setattr(hold, "HELD", "none")
            late.setattr(PlannedModule, "attach", lambda self, model: late.setattr(hold, "HELD", HELD))
            assert run(out) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and all(re.fullmatch(f"error: {refused(out)}", line) for line in errors), errors
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(out, max_steps=1) == 0 and len(losses(out)) == 3


@pytest.mark.parametrize("begun", [False, True], ids=["an empty folder", "a run that has begun"])
def test_a_run_is_not_planned_over_another_one_that_came_in_between(run, losses, tmp_path, monkeypatch, capsys, begun):
    """The other one begins and ends between the plan, made from the newest state, and the lock: what it saved would be trained over."""
    out, setup, files = tmp_path / "out", PlannedModule.setup, {}
    if begun:
        assert run(out, max_steps=1) == 0

    def planned(self, stage):
        monkeypatch.setattr(PlannedModule, "setup", setup)
        with monkeypatch.context() as other:  # another process has another number
            other.setattr(os, "getpid", lambda: 4242)
            assert run(out, max_steps=1) == 0
        files.update({path: path.read_bytes() for path in out.rglob("*") if path.is_file()})
        return setup(self, stage)

    monkeypatch.setattr(PlannedModule, "setup", planned)
    assert run(out, max_steps=1) == 2
    assert re.search(
        rf"error: another run has been in {re.escape(str(out))} \({WHO}\) since this one looked there; start this one again",
        capsys.readouterr().err,
    )
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(out, max_steps=1) == 0 and len(losses(out)) == 2 + begun


@pytest.mark.parametrize("moment", ["while it writes", "before it writes"])
def test_two_preparations_never_write_the_same_weights(run, tmp_path, monkeypatch, capsys, moment):
    """Both would write to one temporary file; the later one would replace what the earlier one's training has begun from."""
    out, weights = tmp_path / "out", running.initial_weights

    def second(config, sizes):
        monkeypatch.setattr(running, "initial_weights", weights)
        assert run(out, train_stage=1, random_seed=2) == 2
        return weights(config, sizes)

    if moment == "while it writes":
        monkeypatch.setattr(running, "initial_weights", second)
        assert run(out, train_stage=1) == 0
        assert re.search(refused(out), capsys.readouterr().err)
    else:
        sizes = running.model_sizes

        def checked(config, path):  # all is as it should be, and now another one begins, and ends
            monkeypatch.setattr(running, "model_sizes", sizes)
            assert run(out, max_steps=1) == 0
            return sizes(config, path)

        monkeypatch.setattr(running, "model_sizes", checked)
        assert run(out, train_stage=1) == 2
        assert f"--train_stage 1 would overwrite the run in {out} (it holds state/)" in capsys.readouterr().err


def test_a_run_that_fails_lets_go_when_it_has_saved(run, tmp_path, monkeypatch, capsys):
    """Another one that begins while the first still writes would find less than will be there, and write between."""
    out, write, keep, held, failed = tmp_path / "out", saver.write, Health.keep, [], threading.Event()

    def late(*arguments):
        failed.wait()
        time.sleep(1)
        with open(out / HELD, "a") as file:
            held.append(not try_lock(file))
        return write(*arguments)

    def fail(self):
        keep(self)
        if self.position.step == 2:
            failed.set()
            raise UserError("no more")

    monkeypatch.setattr(saver, "write", late)
    monkeypatch.setattr(Health, "keep", fail)
    assert run(out, save_steps=1) == 2 and "error: no more\n" in capsys.readouterr().err
    assert held == [True] and (out / "state" / "latest").read_text() == "step1"


def test_a_killed_run_blocks_nobody(run, tmp_path):
    """Nor do processes that it had started: they have nothing of the lock."""
    out = tmp_path / "out"
    take = (
        "import sys, time, subprocess; from pathlib import Path; from rwkvlm.train.hold import Hold; "
        "h = Hold(Path(sys.argv[1])); h.take(); "
        "c = subprocess.Popen(['sleep', '60']); print(c.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", take, str(out)], stdout=subprocess.PIPE, text=True) as other:
        child = int(other.stdout.readline())
        with pytest.raises(UserError, match=rf"\(process {other.pid} on {os.uname().nodename}, since "):
            Hold(out).take()
        other.kill()
        other.wait()
    assert run(out, max_steps=1) == 0
    os.kill(child, 9)


def no_locks(*arguments):
    raise OSError(38, "Function not implemented")


def test_without_locks_the_run_that_began_last_has_the_folder(run, losses, tmp_path, monkeypatch, capsys):
    """As on Lustre without -o flock. The one before ends at its next save, before it has changed anything of the other's."""
    monkeypatch.setattr(fcntl, "flock", no_locks)
    out, step, before = tmp_path / "out", Metrics.step, {}

    def watched(self, record):
        step(self, record)
        if record["step"] == 3:
            while not (latest := out / "state" / "latest").exists() or latest.read_text() != "step2":
                time.sleep(0.01)  # it is written beside the training
            other = Hold(out)
            monkeypatch.setattr(os, "getpid", lambda: 4242)
            other.take()
            other.close()
            before.update({path: path.read_bytes() for path in (*out.glob("rwkv-*"), *out.glob("state/**/*")) if path.is_file()})

    monkeypatch.setattr(Metrics, "step", watched)
    assert run(out, save_steps=2) == 2
    assert re.search(
        rf"error: another run has begun in {re.escape(str(out))} \(process 4242 on .*\) and goes on from what was saved there; "
        r"this one has ended without saving\n$",
        capsys.readouterr().err,
    )
    assert before and before == {path: path.read_bytes() for path in (*out.glob("rwkv-*"), *out.glob("state/**/*")) if path.is_file()}
    monkeypatch.undo()
    assert run(out, max_steps=2) == 0 and len(losses(out)) == 4, "it goes on from step 2"


def test_a_note_that_could_not_be_read_at_first_is_ones_own(tmp_path, monkeypatch):
    mine = Hold(tmp_path)
    with monkeypatch.context() as at_first:
        at_first.setattr(hold, "last_holder", lambda proj_dir: "")
        mine.take()
    mine.check()
    other = Hold(tmp_path)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "getpid", lambda: 4242)
    other.take()
    with pytest.raises(UserError, match="another run has begun .*process 4242"):
        mine.check()
    other.check()
    for each in (mine, other):
        each.close()


def test_a_full_disk_that_keeps_the_note_of_the_run_before_ends_no_run(tmp_path, monkeypatch):
    (tmp_path / HELD).write_text("process 4242 on another, since yesterday\n")

    def full(content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hold, "_locked", lambda proj_dir: SimpleNamespace(truncate=full, write=full, close=lambda: None))
    mine = Hold(tmp_path)
    mine.take(last_holder(tmp_path))
    mine.check()


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe"])
def test_a_note_that_is_gone_or_cannot_be_read_ends_no_run(tmp_path, content):
    mine = Hold(tmp_path)
    mine.take()
    (tmp_path / HELD).unlink()
    if content is not None:
        (tmp_path / HELD).write_bytes(content)
    mine.check()
    mine.close()
