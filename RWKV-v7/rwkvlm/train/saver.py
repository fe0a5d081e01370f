"""Weights and training states, written in a thread while training goes on."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

import torch

from ..checkpoint import ranks
from ..checkpoint.gather import full_weights
from ..checkpoint.ledger import publish_weights
from ..checkpoint.state import Captured, capture, write
from ..config import UserError
from ..models import LanguageModel
from .plan import Plan
from .position import Position

SLOW_DISK = 1800.0  # seconds that one process may write longer than another


class Saver:
    """Copies to host memory while training waits, and writes in a thread of its own, with a process group of its own, while it goes on.

    One save is under way at most: the next one waits for it. The threads of all ranks do the same in the same order, and what fails
    in one fails in all, so that ranks agree about every file.
    """

    def __init__(self, plan: Plan, position: Position, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
        self.plan, self.position, self.model, self.optimizer = plan, position, model, optimizer
        self._asked = time.monotonic()
        self._group = ranks.new_group(max(plan.config.dist_timeout, SLOW_DISK))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._under_way: Future[None] | None = None

    def save(self, weights: list[str], state: bool, last: bool) -> None:
        """Saves bf16 weights under these names, then, if asked, the training state. Collective.

        last: waits for the files and raises UserError when one could not be written. Otherwise a line says so, what was there stays,
        and training goes on: the disk may have room for the next one.
        """
        self.wait()
        tensors = full_weights(self.model) if weights else {}
        captured = capture(self.model, self.optimizer) if state else None
        self._under_way = self._thread.submit(self._write, weights, tensors, captured, self.position.step, self._meta(), last)
        if last:
            self.wait()

    def wait(self) -> None:
        """Until nothing is under way."""
        if self._under_way is not None:
            under_way, self._under_way = self._under_way, None
            under_way.result()

    def close(self) -> None:
        """As `wait`, for a run that has failed: another error adds nothing."""
        self._thread.shutdown()

    def _write(
        self, weights: list[str], tensors: dict[str, torch.Tensor], captured: Captured | None, step: int, meta: dict, last: bool
    ) -> None:
        config = self.plan.config
        try:
            for name in weights:
                publish_weights(config.proj_dir, name, tensors, self._group)
            if captured is not None:
                write(config.proj_dir, step, captured, meta, config.keep_last, self._group)
        except UserError as error:
            if last:
                raise
            ranks.say(f"{error}; training goes on, and older files are as they were")

    def _meta(self) -> dict:
        plan = self.plan
        return {
            "position": asdict(self.position),
            "model": plan.start.model.as_dict(),
            "ctx_len": plan.config.ctx_len,
            "epoch_samples": plan.config.epoch_samples,
            "freeze": plan.config.freeze,
            "magic_prime": plan.data.order,
            "data": plan.identity,
            "warmup_steps": plan.schedule.warmup_steps,
            "precision": plan.config.precision,
            "fp32_products": torch.get_float32_matmul_precision(),
        }

    def state_due(self, mini_epoch_ends: bool) -> bool:
        every = self.plan.config.save_steps
        return self.position.step % every == 0 if every else mini_epoch_ends

    def minutes_due(self) -> bool:
        """Whether save_minutes have passed since this was last true. Only the first process says so, and the others hear it through the
        Agreement: each by its own clock, they would ask for saves at two steps in a row."""
        minutes = self.plan.config.save_minutes
        if ranks.rank() != 0 or not minutes or time.monotonic() - self._asked < 60 * minutes:
            return False
        self._asked = time.monotonic()
        return True
