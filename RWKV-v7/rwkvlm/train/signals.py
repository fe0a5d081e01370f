"""Signals that stop a run or make it save, and how all of its processes act on them at the same step."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from ..checkpoint import ranks

INSIST_AFTER = 3.0  # seconds; `timeout` and terminals may deliver one request twice


class Signals:
    """SIGTERM, SIGINT and SIGHUP (a closed terminal) ask the run to save and stop; asked again after some seconds, they end the process
    at once. SIGUSR1 asks it to save. SIGHUP stays ignored where nohup has it ignored."""

    def __init__(self) -> None:
        self.stop = 0  # number of the signal
        self._save = False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def install(self) -> None:
        handlers = {signal.SIGTERM: self._on_stop, signal.SIGINT: self._on_stop, signal.SIGUSR1: self._on_save}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            handlers[signal.SIGHUP] = self._on_stop
        for signum, handler in handlers.items():
            self._before[signum] = signal.signal(signum, handler)

    def restore(self) -> None:
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)

    def take_save(self) -> bool:
        """Whether a save has been asked for since the last call."""
        asked, self._save = self._save, False
        return asked

    def _on_stop(self, signum: int, frame: object) -> None:
        if not self.stop:
            self.stop, self._since = signum, time.monotonic()
        elif time.monotonic() - self._since > INSIST_AFTER:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def _on_save(self, signum: int, frame: object) -> None:
        self._save = True


class Agreement:
    """The largest of every process's wishes, the same in all of them, one step later.

    The exchange runs beside the step, between CPUs: neither device nor host waits for it. Alone, the answer comes at once.
    """

    def __init__(self, timeout_s: float) -> None:
        self._alone = ranks.world_size() == 1
        self._group = ranks.new_group(timeout_s)
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def exchange(self, *wishes: int) -> list[int]:
        """Collective: hand in this step's wishes, get the agreed ones of the step before (zeros in the first)."""
        if self._alone:
            return list(wishes)
        agreed = [0] * len(wishes)
        if self._pending is not None:
            work, values = self._pending
            work.wait()
            agreed = values.tolist()
        values = torch.tensor(wishes, dtype=torch.int32)
        self._pending = (dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group, async_op=True), values)
        return agreed

    def finish(self) -> None:
        """Wait for the exchange under way, so that no process leaves while another still needs it."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None
