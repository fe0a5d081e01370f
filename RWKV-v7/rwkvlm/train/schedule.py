"""The learning rate and the end of training, as pure functions of tokens consumed.

cosine: RWKV-LM, RWKV-v7/train_temp/src/trainer.py. Where it prints "using linear LR schedule" (lr_init or lr_final 0) it computes the
cosine all the same, or divides by zero: here it is the cosine always, in a form without that division.
wsd: warm-up, stable, decay (arXiv 2404.06395), falling with 1 - sqrt (arXiv 2405.18392), so that a run can be prolonged
from before the fall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """lr_init, lr_final: after the warm-up and at the end; shape "constant" never leaves lr_init.

    warmup_steps: optimizer steps with a linear ramp from 1% of the rate; the cosine begins after their tokens.
    exit_tokens: where the schedule and the training end.
    tokens_per_step: of the global batch, micro batches and devices included.
    shape: "cosine", "wsd" or "constant"; decay: share of exit_tokens over which "wsd" falls.
    """

    lr_init: float
    lr_final: float
    warmup_steps: int
    exit_tokens: int
    tokens_per_step: int
    shape: str = "cosine"
    decay: float = 0.2

    def progress(self, tokens: int) -> float:
        """0 to 1 along the cosine, `tokens` having been consumed."""
        warmup_tokens = self.warmup_steps * self.tokens_per_step
        if tokens >= self.exit_tokens:
            return 1.0
        return max(0, tokens - warmup_tokens) / max(1, self.exit_tokens - warmup_tokens)

    def lr(self, tokens: int, warmup_step: int) -> float:
        """The rate of the step that begins after `tokens`, the warmup_step-th (from 0) since the warm-up began."""
        lr = (self.lr_init + self.lr_final) / 2 + (self.lr_init - self.lr_final) / 2 * self._height(tokens)
        if warmup_step < self.warmup_steps:
            lr *= 0.01 + 0.99 * warmup_step / self.warmup_steps
        return lr

    def _height(self, tokens: int) -> float:
        """1 at lr_init, -1 at lr_final."""
        if self.shape == "constant":
            return 1.0
        if self.shape == "cosine":
            return math.cos(math.pi * self.progress(tokens))
        fallen = min(1.0, max(0.0, 1 - (self.exit_tokens - tokens) / (self.decay * self.exit_tokens)))
        return 1 - 2 * math.sqrt(fallen)

    def finished(self, tokens: int) -> bool:
        return tokens >= self.exit_tokens

    def steps_left(self, tokens: int) -> int:
        """Optimizer steps until training ends; the last one may go past exit_tokens by less than a step."""
        return max(0, -(-(self.exit_tokens - tokens) // self.tokens_per_step))
