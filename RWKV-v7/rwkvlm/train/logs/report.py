"""report.html: one self-contained page with the curves of a run, made again from metrics.jsonl while the training goes on.

A thread of the first process reads what has been added to metrics.jsonl and writes the page; the training thread does nothing for
it. `python -m rwkvlm report OUT` makes the page of any run, also of one that is on another machine or long over.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...checkpoint.ranks import describe, say
from .log import Log

NAME = "report.html"
FIRST, LATER = 2.0, 15.0  # seconds between two pages, in the first minute and later; also how often a browser looks
BUCKETS = 1200  # most points of a curve: more steps than that are averaged
EVENTS = 500  # most that are kept
KEYS = ("step", "tokens", "hours", "loss", "lr", "grad_norm", "tokens_per_s", "tflops", "mfu", "memory_mb")


class Curves:
    """All that the page shows, from the lines of metrics.jsonl in order; memory does not grow with the run."""

    def __init__(self) -> None:
        self.width = 1  # steps in a bucket
        self.buckets: dict[int, dict[str, list[float]]] = {}  # key: [sum, count]
        self.validations: dict[int, tuple[int, float, float]] = {}  # step: tokens, hours, loss
        self.events: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.hours_before = self.hours = 0.0  # of training, of the processes before and until now

    def add(self, record: dict[str, Any]) -> None:
        if "run" in record:
            self._begin(record)
        elif "val_loss" in record:
            if record["val_loss"] is not None:
                self.validations[record["step"]] = (record["tokens"], self.hours, record["val_loss"])
        elif "loss" in record:
            self._step(record)

    def _begin(self, record: dict[str, Any]) -> None:
        """A process begins after `step`: what an earlier one did beyond it is done again."""
        step = record["step"]
        self.settings, self.last = record["settings"], {}
        self.buckets = {key: bucket for key, bucket in self.buckets.items() if key * self.width < step}
        self.validations = {key: value for key, value in self.validations.items() if key <= step}
        self.events = [event for event in self.events if event["step"] <= step]

        def furthest(key: str, default: float) -> float:
            return max((bucket[key][0] / bucket[key][1] for bucket in self.buckets.values()), default=default)

        self.hours_before = self.hours = furthest("hours", 0.0)
        if step:  # in tokens it may be anywhere: until now the batch may have been another one
            tokens = furthest("tokens", step * self.settings.get("real_bsz", 0) * self.settings.get("ctx_len", 0))
            self._event("start", step, round(tokens), f"went on at {record['run']}")

    def _step(self, record: dict[str, Any]) -> None:
        self.last = record
        self.hours = self.hours_before + record.get("seconds", 0.0) / 3600
        bucket = self.buckets.setdefault((record["step"] - 1) // self.width, {})
        numbers = record | {"hours": self.hours} | {f"part {part}": norm for part, norm in (record.get("grad_norms") or {}).items()}
        for key, value in numbers.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                total = bucket.setdefault(key, [0.0, 0])
                total[0] += value
                total[1] += 1
        if record.get("skipped"):
            self._event("skipped", record["step"], record["tokens"], "skipped: loss or gradient not finite")
        if "undone_to" in record:
            self._event(
                "undone",
                record["step"],
                record["tokens"],
                f"loss {record['loss']:.4f}: undone, back to the weights of step {record['undone_to']}",
            )
        if len(self.buckets) > BUCKETS:
            self._merge()

    def _event(self, kind: str, step: int, tokens: int, text: str) -> None:
        self.events = [*self.events, {"kind": kind, "step": step, "tokens": tokens, "hours": self.hours, "text": text}][-EVENTS:]

    def _merge(self) -> None:
        merged: dict[int, dict[str, list[float]]] = {}
        for key, bucket in self.buckets.items():
            into = merged.setdefault(key // 2, {})
            for name, (total, count) in bucket.items():
                have = into.setdefault(name, [0.0, 0])
                have[0] += total
                have[1] += count
        self.width, self.buckets = 2 * self.width, merged

    def data(self, state: str, refresh: float) -> dict[str, Any]:
        """What report.html embeds."""
        ordered = [self.buckets[key] for key in sorted(self.buckets)]

        def curve(name: str) -> list[float | None]:
            return [float(f"{b[name][0] / b[name][1]:.6g}") if name in b else None for b in ordered]

        series = {key: curve(key) for key in KEYS}
        for key in ("step", "tokens"):
            series[key] = [round(b[key][0] / b[key][1]) for b in ordered]
        parts = list(dict.fromkeys(name for b in ordered for name in b if name.startswith("part ")))
        held_out = [(step, *self.validations[step]) for step in sorted(self.validations)]
        s = self.settings
        return {
            "title": f"{s.get('my_testing', '')} L{s.get('n_layer')} D{s.get('n_embd')} · {s.get('data_file', '')}",
            "subtitle": f"{s.get('proj_dir', '')} · context {s.get('ctx_len')} · "
            f"{s.get('real_bsz')} samples a step · {s.get('precision')} · {s.get('strategy')}",
            "state": state,
            "written": time.time(),
            "refresh": refresh,
            "seconds": self.last.get("seconds"),
            "speed": self._speed(ordered),
            "settings": s,
            "series": series,
            "parts": {name.removeprefix("part "): curve(name) for name in parts},
            "validation": dict(zip(("step", "tokens", "hours", "loss"), zip(*held_out)))
            if held_out
            else {"step": [], "tokens": [], "hours": [], "loss": []},
            "events": self.events,
        }

    def _speed(self, ordered: list[dict]) -> float | None:
        """Tokens a second over the last twentieth of the points."""
        rates = [b["tokens_per_s"] for b in ordered[-max(1, len(ordered) // 20) :] if "tokens_per_s" in b]
        return sum(r[0] for r in rates) / sum(r[1] for r in rates) if rates else None

    @property
    def finished(self) -> bool:
        return bool(self.last) and self.last["tokens"] >= (self.settings.get("my_exit_tokens") or float("inf"))


class Follower:
    """Reads metrics.jsonl as it grows and writes report.html beside it."""

    def __init__(self, proj_dir: Path) -> None:
        self.source, self.target = proj_dir / "metrics.jsonl", proj_dir / NAME
        self.curves, self.read, self.complained = Curves(), 0, False
        self.template = Path(__file__).with_suffix(".html").read_text()

    def write(self, running: bool, refresh: float = LATER) -> None:
        """All or nothing; a full disk costs a line, once."""
        with suppress(OSError):  # metrics.jsonl is gone: the page shows what was read of it
            self._read()
        state = "training" if running else "finished" if self.curves.finished else "stopped"
        data = json.dumps(self.curves.data(state, refresh)).replace("<", "\\u003c")
        temporary = self.target.with_name(f".{NAME}.tmp")
        try:
            temporary.write_text(self.template.replace("/*DATA*/null", data))
            os.replace(temporary, self.target)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()  # half a page, in room that others may need
            if not self.complained:
                self.complained = True
                say(f"cannot write {self.target}: {describe(error)}; it stays as it is until there is room")

    def _read(self) -> None:
        with open(self.source, "rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                with suppress(ValueError):  # half a line of a process that was killed
                    self.curves.add(json.loads(line))


class Report(Log):
    """The page of the run that this process trains."""

    def __init__(self, proj_dir: Path) -> None:
        self.follower = Follower(proj_dir)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="report", daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        begin, refresh = time.monotonic(), FIRST
        while not self.over.wait(refresh):
            refresh = FIRST if time.monotonic() - begin < 60 else LATER
            self.follower.write(running=True, refresh=refresh)

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        self.follower.write(running=False)
