"""What every log is told, of which each takes what concerns it; and the file that logs append lines to."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ...checkpoint.ranks import describe, say

T = TypeVar("T")


class Log:
    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step.

        step, tokens, loss, lr, grad_norm and grad_norms by part of the model (None: unknown), tokens_per_s, tflops (per
        device, of the model), mfu (None: the device's peak is unknown), seconds (of this process), memory_mb. Only some
        steps have

            meta_loss   a Phantom's other term, without its weight; not part of loss
            skipped     True: a number was not finite, and the step has changed nothing
            undone_to   the step whose weights the spike guard has gone back to
        """

    def mini_epoch(self, number: int, loss: float, lr: float) -> None:
        """A mini-epoch has ended. loss: mean over its steps; lr: of its last step."""

    def validation(self, record: dict[str, Any]) -> None:
        """step, tokens, val_loss."""

    def close(self) -> None:
        """Nothing follows."""


class Foreign(Log):
    """A log that another library keeps, and without which training goes on.

    Where it fails, on a full disk or because its service is gone, a line says so. begin: makes the log, which may fail too.
    """

    def __init__(self, name: str, begin: Callable[[], Log]) -> None:
        self.name = name
        self.log: Log | None = self._try(begin)

    def _tell(self, what: str, *arguments: Any) -> None:
        if self.log is not None:
            self._try(getattr(self.log, what), *arguments)

    def _try(self, call: Callable[..., T], *arguments: Any) -> T | None:
        try:
            return call(*arguments)
        except Exception as error:  # whatever that library raises
            say(f"{self.name} fails ({describe(error)}); this run goes on without it")
            self.log = None
            return None

    def step(self, record: dict[str, Any]) -> None:
        self._tell("step", record)

    def mini_epoch(self, number: int, loss: float, lr: float) -> None:
        self._tell("mini_epoch", number, loss, lr)

    def validation(self, record: dict[str, Any]) -> None:
        self._tell("validation", record)

    def close(self) -> None:
        self._tell("close")


class LogFile:
    """A file of whole lines, also after kill -9 and on a full disk, which costs lines, said once, and not the training."""

    def __init__(self, path: Path) -> None:
        self.path, self.complained = path, False
        self.file = open(path, "a+b", buffering=0)
        self.size = self._whole_lines()
        self.file.truncate(self.size)

    def _whole_lines(self) -> int:
        """Bytes up to the last line break: a process may have been stopped within a line."""
        end = self.file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            self.file.seek(start)
            if (at := self.file.read(end - start).rfind(b"\n")) >= 0:
                return start + at + 1
            end = start
        return 0

    def write(self, lines: str) -> None:
        data = lines.encode()
        try:
            if self.file.write(data) < len(data):
                raise OSError(f"no space left for {self.path}")
            self.size += len(data)
        except OSError as error:
            with suppress(OSError):
                self.file.truncate(self.size)
            if not self.complained:
                self.complained = True
                say(f"cannot write {self.path}: {describe(error)}; lines are lost until there is room")

    def close(self) -> None:
        self.file.close()
