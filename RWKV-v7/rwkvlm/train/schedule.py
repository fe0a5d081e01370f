"""The learning rate and the end of training, as pure functions of tokens consumed.

Source: RWKV-LM, RWKV-v7/train_temp/src/trainer.py. Where it prints "using linear LR schedule" (lr_init or lr_final 0) it computes the
cosine all the same, or divides by zero: here it is the cosine always, in a form without that division.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """lr_init, lr_final: at the beginning and end of the cosine.

    warmup_steps: optimizer steps with a linear ramp from 1% of the rate; the cosine begins after their tokens.
    exit_tokens: where the cosine and the training end.
    tokens_per_step: of the global batch, micro batches and devices included.
    """

    lr_init: float
    lr_final: float
    warmup_steps: int
    exit_tokens: int
    tokens_per_step: int

    def progress(self, tokens: int) -> float:
        """0 to 1 along the cosine, `tokens` having been consumed."""
        warmup_tokens = self.warmup_steps * self.tokens_per_step
        if tokens >= self.exit_tokens:
            return 1.0
        return max(0, tokens - warmup_tokens) / max(1, self.exit_tokens - warmup_tokens)

    def lr(self, tokens: int, warmup_step: int) -> float:
        """The rate of the step that begins after `tokens`, the warmup_step-th (from 0) since the warm-up began."""
        cosine = math.cos(math.pi * self.progress(tokens))
        lr = (self.lr_init + self.lr_final) / 2 + (self.lr_init - self.lr_final) / 2 * cosine
        if warmup_step < self.warmup_steps:
            lr *= 0.01 + 0.99 * warmup_step / self.warmup_steps
        return lr

    def finished(self, tokens: int) -> bool:
        return tokens >= self.exit_tokens

    def steps_left(self, tokens: int) -> int:
        """Optimizer steps until training ends; the last one may go past exit_tokens by less than a step."""
        return max(0, -(-(self.exit_tokens - tokens) // self.tokens_per_step))
