"""train_log.txt in the official format (RWKV-LM, RWKV-v7/train_temp/src/trainer.py), which plotting scripts read."""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from ..plan import Plan
from .log import Log, LogFile


class TrainLog(Log):
    """Appends. `NEW RUN {time}`, the settings, DeepSpeed's configuration, then seven fields per mini-epoch:
    `{mini-epoch} {loss} {exp(loss)} {lr} {date} {time} {mini-epoch of this process}`."""

    def __init__(self, plan: Plan, deepspeed_config: dict[str, Any] | None, now: datetime) -> None:
        self.file, self.ended = LogFile(plan.proj_dir / "train_log.txt"), 0
        self.file.write(f"NEW RUN {now:%Y-%m-%d-%H-%M-%S}\n{plan.settings()}\n")
        if deepspeed_config:
            self.file.write(f"{deepspeed_config}\n")

    def mini_epoch(self, number: int, loss: float, lr: float) -> None:
        perplexity = math.exp(min(loss, 700.0))  # exp overflows at 710
        self.file.write(f"{number} {loss:.6f} {perplexity:.4f} {lr:.8f} {datetime.now()} {self.ended}\n")
        self.ended += 1

    def close(self) -> None:
        self.file.close()
