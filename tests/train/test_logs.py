"""Logs by themselves: what a person and what wandb see."""

import io
import os
import re
import resource
import subprocess
import sys
import time
from datetime import datetime
from types import SimpleNamespace

import pytest

from rwkvlm.config import ModelConfig, TrainConfig
from rwkvlm.train.logs.log import LogFile
from rwkvlm.train.logs.metrics import Metrics
from rwkvlm.train.logs.progress import Progress, clock
from rwkvlm.train.logs.weights_and_biases import WeightsAndBiases
from rwkvlm.train.position import Position
from rwkvlm.train.schedule import Schedule


def plan(folder, **flags):
    config = TrainConfig(ctx_len=100, epoch_samples=50, **flags)
    return SimpleNamespace(
        config=config,
        proj_dir=folder,
        schedule=Schedule(1e-3, 1e-4, 0, 20_000, 1000),
        tokens=0,
        steps=20,
        start=SimpleNamespace(position=Position(), model=ModelConfig(n_layer=2, n_embd=64, vocab_size=256)),
        settings=lambda: {"n_layer": 2},
    )


def record(step: int, loss: float = 3.0) -> dict:
    return {
        "step": step,
        "tokens": 1000 * step,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_s": 500.0,
        "seconds": 2.0 * step,
        "memory_mb": 100.0,
    }


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3600, "1:00:00"), (90061, "1d 1:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


@pytest.fixture(autouse=True)
def no_dumb_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # whatever these tests are started in


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_one_line_is_rewritten(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    now = [1000.0]
    monkeypatch.setattr("rwkvlm.train.logs.progress.time.monotonic", lambda: now[0])
    bar = Progress(plan(tmp_path))
    bar.step(record(1))
    for step in range(2, 12):
        now[0] += 0.019
        bar.step(record(step))  # within a fraction of a second: not drawn
    bar.validation({"step": 11, "tokens": 11000, "val_loss": 2.5})
    bar.close()
    drawn = screen.getvalue()
    assert drawn.count("\n") == 2 and drawn.count("\r") == 3 and max(map(len, re.split(r"[\r\n]", drawn))) <= 84
    assert "validation loss 2.5000 at step 11" in drawn and "step 11/20" in drawn and "mini-epoch 2" in drawn


def test_a_terminal_is_left_with_the_last_step(tmp_path, monkeypatch):
    """And without an empty line, where the lines of its mini-epoch and of a validation had come after it."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    bar = Progress(plan(tmp_path))
    bar.close()
    assert screen.getvalue() == ""
    bar.step(record(1))
    bar.mini_epoch(0, 3.0, 1e-3)
    bar.close()
    assert re.sub(r".*\r|\x1b\[K", "", screen.getvalue()).splitlines() == ["mini-epoch 0: mean loss 3.0000", bar.line]


def test_a_narrow_terminal_shows_whole_numbers(tmp_path, monkeypatch):
    """The end was cut off where it stood: of "left 2:46:06" on 80 columns "left 2:46" was there to read."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    whole = ["step 1/10001", "mini-epoch 0  20%", "loss 3.0000", "lr 1.00e-03", "0.50 kt/s", "left 5:33:20"]
    for columns, shown in (
        (100, whole),
        (80, [*whole[:3], *whole[4:]]),
        (60, [whole[0], whole[2], *whole[4:]]),
        (40, [whole[0], whole[2], whole[5]]),
        (20, [whole[0]]),
        (9, ["step 1/1"]),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        long = plan(tmp_path)
        long.steps = 10_001
        screen.seek(0), screen.truncate()
        Progress(long).step(record(1))
        assert screen.getvalue() == "\r" + "  ".join(shown) + "\x1b[K" and len("  ".join(shown)) < columns


def test_a_dumb_terminal_gets_plain_lines(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "dumb")
    bar = Progress(plan(tmp_path))
    bar.step(record(1))
    bar.mini_epoch(0, 3.0, 1e-3)
    bar.close()
    assert screen.getvalue() == f"{bar.line}\nmini-epoch 0: mean loss 3.0000\n"


def test_training_outlives_its_terminal(tmp_path, monkeypatch):
    class Gone(Terminal):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Gone())
    bar = Progress(plan(tmp_path))
    bar.step(record(1))
    bar.mini_epoch(0, 3.0, 1e-3)
    bar.close()


def test_output_that_nobody_takes_does_not_change_the_exit_code():
    """What a full disk, or a reader that is gone, has left in Python's buffer."""
    code = (
        "import sys; from rwkvlm.train.logs.progress import Progress; "
        "bar = Progress.__new__(Progress); bar.terminal, bar.watched = False, True; bar._note('x'); bar._note('y'); sys.exit(143)"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert (done.returncode, done.stderr) == (143, "")


def test_the_speed_is_that_of_the_training(tmp_path, capsys, monkeypatch):
    """A long validation made the next steps a tenth as fast, and the time left ten times as long."""
    now = [1000.0]
    monkeypatch.setattr("rwkvlm.train.logs.progress.time.monotonic", lambda: now[0])
    bar = Progress(plan(tmp_path))
    for step in range(1, 5):
        now[0] += 2
        bar.step(record(step))
    now[0] += 60
    bar.validation({"step": 4, "tokens": 4000, "val_loss": 2.5})
    now[0] += 2
    bar.step(record(5) | {"tokens_per_s": 100.0})  # of one step, with what has been saved before it
    assert capsys.readouterr().out.splitlines()[-1].endswith("0.50 kt/s  left 0:30")


@pytest.mark.parametrize("steps, left", [(20, "0:18"), (12, "0:02")])
def test_elsewhere_a_line_every_ten_seconds(tmp_path, capsys, monkeypatch, steps, left):
    """With what is left to the end of the training, or to --max_steps."""
    now = [1000.0]
    monkeypatch.setattr("rwkvlm.train.logs.progress.time.monotonic", lambda: now[0])
    this = plan(tmp_path)
    this.steps = steps
    bar = Progress(this)
    for step in range(1, 13):
        now[0] += 2
        bar.step(record(step))
    lines = capsys.readouterr().out.splitlines()
    assert [int(re.match(rf"step (\d+)/{steps} ", line)[1]) for line in lines] == [1, 6, 11]
    assert lines[-1].endswith(f"0.50 kt/s  left {left}")  # 1000 tokens a step, at 500 a second


def test_the_loss_is_smoothed_from_the_first_step_on(tmp_path, capsys, monkeypatch):
    """After a resume the single loss of the first step made a third of what was shown even twenty steps later."""
    monkeypatch.setattr("rwkvlm.train.logs.progress.ELSEWHERE_S", 0.0)
    bar = Progress(plan(tmp_path))
    bar.step(record(1, float("nan")) | {"skipped": True})
    for step in range(2, 22):
        bar.step(record(step, 3.0 + step % 2))
    bar.step(record(22, 13.5))
    shown = re.findall(r"loss (\S+)", capsys.readouterr().out)
    assert shown[:5] == ["nan", "3.0000", "3.5000", "3.3333", "3.5000"] and shown[20:] == ["3.5000", "4.0000"]


def test_json_has_no_nan(tmp_path):
    log = Metrics(plan(tmp_path), datetime(2026, 11, 21))
    log.step(record(1, float("nan")))
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": null' in text and "NaN" not in text and text.startswith('{"run": "2026-11-21-00-00-00"')


def test_wandb_without_a_login_is_offline_and_asks_nothing(run, tmp_path, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert run(tmp_path / "out", wandb="Test", max_steps=3) == 0
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("wandb")]
    assert len(said) == 1 and "nobody is logged in; logging offline into" in said[0]
    written = list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 1
    until = time.monotonic() + 60  # its service writes behind
    while b"kt/s" not in written[0].read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    content = written[0].read_bytes()
    for key in (b"loss", b"lr", b"wd", b"Gtokens", b"kt/s", b"256 ctx32 L2 D64 20"):
        assert key in content


def test_a_resumed_training_goes_on_in_its_run_of_wandb(tmp_path, monkeypatch, capsys):
    """Online. A training from its beginning or from weights has a new run.

    So has each process offline: `wandb sync` would put such runs in each other's place.
    """
    begun, modes, logged = [], [], []

    class Error(Exception):
        pass

    def init(**asked):
        begun.append(asked)
        if asked["id"] == "gone":
            raise Error("run gone was deleted")
        return SimpleNamespace(
            id=asked["id"] or f"run{len(begun)}", step=6 if asked["id"] else 0, log=lambda numbers, step: logged.append(step)
        )

    settings = SimpleNamespace(api_key="key")
    fake = SimpleNamespace(init=init, setup=lambda: SimpleNamespace(settings=settings), Settings=dict, errors=SimpleNamespace(Error=Error))
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def begin(step: int, mode: str = "online", state: bool = True) -> dict:
        settings.mode = mode
        this = plan(tmp_path, wandb="Test")
        this.start.position.step, this.start.state = step, object() if state and step else None
        WeightsAndBiases(this, datetime(2026, 11, 21)).validation({"val_loss": 3.0, "step": step})
        modes.append(begun[-1]["mode"])
        return begun[-1]

    assert begin(5)["id"] is None, "nothing is known of an earlier one"
    assert begin(0)["id"] is None and begun[-1]["name"] == "256 ctx100 L2 D64 2026-11-21-00-00-00"
    for _ in range(2):
        found = begin(5)
        assert (found["id"], found["resume"], found["name"]) == ("run2", "allow", None), "under its own name"
    assert logged == [5, 0, 6, 6], "wandb takes no step that is behind it"
    assert begin(5, "offline")["id"] is None and begin(0)["id"] is None and begin(9)["id"] == "run6"
    assert begin(3, state=False)["id"] is None, "it would leave out the steps that it has"
    (tmp_path / "wandb" / "run_id").write_text("")
    assert begin(9)["id"] is None and modes[-1] == "online", "the disk was full"
    (tmp_path / "wandb" / "run_id").write_text("gone")
    assert begin(9)["id"] is None and modes[-1] == "offline"
    said = capsys.readouterr().err
    assert "run gone was deleted; logging offline" in said and f"(if run gone is gone for good, remove {tmp_path}/wandb/run_id:" in said


@pytest.mark.parametrize("package, flags", [("wandb", dict(wandb="Test")), ("tensorboard", dict(tensorboard=1))])
def test_a_package_that_is_not_installed_is_said_at_once(run, tmp_path, monkeypatch, capfd, package, flags):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    assert run(tmp_path / "out", **flags) == 2
    assert (
        f"--{package} {flags[package]}: {package} is not installed; run: {sys.executable} -m pip install {package}, or leave"
        in capfd.readouterr().err
    )


def test_a_line_cut_by_a_kill_does_not_spoil_the_next(tmp_path):
    (tmp_path / "log").write_text("whole\n" + "x" * 100_000)
    file = LogFile(tmp_path / "log")
    file.write("next\n")
    assert (tmp_path / "log").read_text() == "whole\nnext\n"
    (tmp_path / "cut").write_text("no line")
    LogFile(tmp_path / "cut").write("first\n")
    assert (tmp_path / "cut").read_text() == "first\n"


def test_a_full_disk_costs_lines_not_the_training(tmp_path, capsys):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = LogFile(tmp_path / "log")
    file.write("before\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, old[1]))  # any larger file fails like on a full disk, after a part of the line
    try:
        file.write("lost\n")
        file.write("lost\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    file.write("after\n")
    assert (tmp_path / "log").read_text() == "before\nafter\n"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "lines are lost until there is room" in said
