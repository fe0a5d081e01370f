"""What every log can be told; each one listens to what concerns it."""

from __future__ import annotations

from typing import Any


class Log:
    def step(self, record: dict[str, Any]) -> None:
        """One optimizer step: step, tokens, loss, lr, grad_norm (None: unknown), tokens_per_s, seconds (of this process), memory_mb."""

    def mini_epoch(self, number: int, loss: float, lr: float, number_in_this_run: int) -> None:
        """A mini-epoch has ended. loss: mean over its steps; lr: of its last step."""

    def validation(self, record: dict[str, Any]) -> None:
        """step, tokens, val_loss."""

    def close(self) -> None:
        """Nothing follows."""
