"""metrics.jsonl: every number of a run, one JSON object a line, for programs.

    {"run": "2026-11-21-10-00-00", "step": 0, "settings": {...}}         a process begins
    {"step": 1, "tokens": 4096, "loss": 11.09, "lr": 6e-06, "grad_norm": 1.5, "grad_norms": {"emb": 0.3, "att": 1.1, ...},
     "tokens_per_s": 8000.0, "tflops": 0.8, "mfu": null, "seconds": 0.5, "memory_mb": 900.0}       (one line; what the keys mean: log.py)
    {"step": 100, "tokens": 409600, "val_loss": 6.5}

A run that goes on from an earlier step writes its steps again: of two records of a step the later one counts.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

from ..plan import Plan
from .log import Log, LogFile


class Metrics(Log):
    def __init__(self, plan: Plan, now: datetime) -> None:
        self.file = LogFile(plan.proj_dir / "metrics.jsonl")
        self._write({"run": f"{now:%Y-%m-%d-%H-%M-%S}", "step": plan.start.position.step, "settings": plan.settings()})

    def _write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(_plain(record)) + "\n")

    def step(self, record: dict[str, Any]) -> None:
        self._write(record)

    def validation(self, record: dict[str, Any]) -> None:
        self._write(record)

    def close(self) -> None:
        self.file.close()


def _plain(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
