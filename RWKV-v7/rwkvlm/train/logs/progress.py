"""The line that a person watches: rewritten in place in a terminal, a new one every ten seconds elsewhere."""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Any

from ...config import env
from ..plan import Plan
from .log import Log

IN_TERMINAL_S, ELSEWHERE_S = 0.2, 10.0  # seconds between two lines
WINDOW_S = 30.0  # speed and time left are averages over so many seconds
STEPS = 20  # the loss that is shown is the mean of so many, then smoothed over about as many
LESS = (3, 1, 4, 5, 2)  # the line's parts that a narrow terminal does without, in this order: lr, mini-epoch, speed, time left, loss


class Progress(Log):
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.terminal, self.watched = env.rewrites_lines(sys.stdout), True
        self.total = plan.start.position.step + plan.steps
        self.times: deque[tuple[float, int]] = deque()
        self.loss, self.losses = 0.0, 0
        self.shown = -ELSEWHERE_S
        self.line = self.last_shown = ""

    def step(self, record: dict[str, Any]) -> None:
        now, tokens = time.monotonic(), record["tokens"]
        if not record.get("skipped"):  # of a skipped step it may be NaN
            self.losses = min(self.losses + 1, STEPS)
            self.loss += (record["loss"] - self.loss) / self.losses
        self.times.append((now, tokens))
        while now - self.times[0][0] > WINDOW_S and len(self.times) > 2:
            self.times.popleft()
        first_time, first_tokens = self.times[0]
        rate = (tokens - first_tokens) / (now - first_time) if now > first_time else record["tokens_per_s"]
        left = (self.total - record["step"]) * self.plan.schedule.tokens_per_step / max(rate, 1e-9)
        samples = tokens // self.plan.config.ctx_len
        mini_epoch, into = divmod(samples - 1, self.plan.config.epoch_samples)
        parts = [
            f"step {record['step']}/{self.total}",
            f"mini-epoch {mini_epoch} {100 * (into + 1) // self.plan.config.epoch_samples:3d}%",
            f"loss {self.loss if self.losses else math.nan:.4f}",
            f"lr {record['lr']:.2e}",
            f"{rate / 1000:.2f} kt/s",
            f"left {clock(left)}",
        ]
        self.line = _fitting(parts, shutil.get_terminal_size().columns - 1) if self.terminal else "  ".join(parts)
        if now - self.shown >= (IN_TERMINAL_S if self.terminal else ELSEWHERE_S):
            self.shown = now
            self._show()

    def _show(self) -> None:
        self.last_shown = self.line
        if self.terminal:
            self._print(f"\r{self.line}\x1b[K")
        else:
            self._print(f"{self.line}\n")

    def _note(self, text: str) -> None:
        """A line that stays."""
        self._print(f"\r{text}\x1b[K\n" if self.terminal else f"{text}\n")

    def _print(self, text: str) -> None:
        if self.watched:
            try:
                print(text, end="", flush=True)
            except OSError:  # the terminal or the reader of the pipe is gone, or the disk full: training goes on
                self.watched = False
                with suppress(OSError):  # at exit Python would try the rest again, and the exit code of a finished training be 120
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def mini_epoch(self, number: int, loss: float, lr: float) -> None:
        self._note(f"mini-epoch {number}: mean loss {loss:.4f}")

    def validation(self, record: dict[str, Any]) -> None:
        if self.times:  # the speed is that of the training
            pause = time.monotonic() - self.times[-1][0]
            self.times = deque((then + pause, tokens) for then, tokens in self.times)
        self._note(f"validation loss {record['val_loss']:.4f} at step {record['step']}")

    def close(self) -> None:
        if self.line and (self.terminal or self.line != self.last_shown):  # in a terminal the last step's mini-epoch stands in its place
            self._show()
            self._print("\n" * self.terminal)


def _fitting(parts: list[str], width: int) -> str:
    """The parts in one line, whole ones: half a number reads as another one."""
    left_out: set[int] = set()
    for less in LESS:
        if len("  ".join(part for k, part in enumerate(parts) if k not in left_out)) <= width:
            break
        left_out.add(less)
    return "  ".join(part for k, part in enumerate(parts) if k not in left_out)[:width]


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour, with days in front where there are any."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    text = f"{h}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
    return f"{days}d {text}" if days else text
