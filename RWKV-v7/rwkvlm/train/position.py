"""How far a run has come. Everything that decides what the next step reads and with which rate is in here."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Position:
    """step: optimizer steps of the whole run. samples: consumed so far; the next is number samples + 1.

    warmup_step: optimizer steps since the warm-up began (it begins again only when a run goes on from weights alone).
    epoch_loss, epoch_steps: sum of the losses and number of steps of the current mini-epoch, those with a finite loss.
    skipped, undone: steps that changed nothing because a number was not finite, and that the spike guard took back.
    loss_mean, loss_variance, loss_steps: running statistics for the spike guard.
    unvalidated: a signal has stopped the validation after this step, which is made when the run goes on.
    """

    step: int = 0
    samples: int = 0
    warmup_step: int = 0
    epoch_loss: float = 0.0
    epoch_steps: int = 0
    skipped: int = 0
    undone: int = 0
    loss_mean: float = 0.0
    loss_variance: float = 0.0
    loss_steps: int = 0
    unvalidated: bool = False

    def advance(self, samples: int) -> None:
        self.step += 1
        self.samples += samples
        self.warmup_step += 1

    def close_mini_epoch(self) -> float:
        """The mean loss of the mini-epoch that has ended, NaN when no step of it had one; its sums begin anew."""
        mean = self.epoch_loss / self.epoch_steps if self.epoch_steps else math.nan
        self.epoch_loss, self.epoch_steps = 0.0, 0
        return mean
