"""Saving: weights for the world, training states for this run."""

from __future__ import annotations

import time

import torch

from ..checkpoint.gather import full_weights
from ..checkpoint.ledger import publish_weights
from ..checkpoint.state import save_state
from ..models import LanguageModel
from .plan import Plan
from .position import Position
from .start import FINAL_NAME


class Saver:
    """Every method that saves is collective."""

    def __init__(self, plan: Plan, position: Position, model: LanguageModel, optimizer: torch.optim.Optimizer) -> None:
        self.plan, self.position, self.model, self.optimizer = plan, position, model, optimizer
        self._asked = time.monotonic()

    def weights(self, mini_epoch: int) -> None:
        publish_weights(self.plan.proj_dir, f"rwkv-{mini_epoch}.pth", full_weights(self.model))

    def final(self) -> None:
        publish_weights(self.plan.proj_dir, FINAL_NAME, full_weights(self.model))

    def state(self) -> None:
        plan = self.plan
        meta = {
            "position": self.position.as_dict(),
            "model": plan.start.model.as_dict(),
            "ctx_len": plan.config.ctx_len,
            "magic_prime": plan.samples.prime,
            "warmup_steps": plan.schedule.warmup_steps,
            "precision": plan.config.precision,
        }
        save_state(plan.proj_dir, self.position.step, self.model, self.optimizer, meta, plan.config.keep_last)

    def state_due(self, mini_epoch_ends: bool) -> bool:
        every = self.plan.config.save_steps
        return self.position.step % every == 0 if every else mini_epoch_ends

    def minutes_due(self) -> bool:
        """Whether save_minutes have passed since this was last true. Clocks differ: the answer must go through the Agreement."""
        minutes = self.plan.config.save_minutes
        if not minutes or time.monotonic() - self._asked < 60 * minutes:
            return False
        self._asked = time.monotonic()
        return True
