"""TensorBoard, with the names of metrics.jsonl, against steps: `tensorboard --logdir OUT/tensorboard`."""

from __future__ import annotations

from typing import Any

from ..plan import Plan
from .log import Log

SKIPPED = ("step", "seconds", "skipped", "undone_to")


class TensorBoard(Log):
    def __init__(self, plan: Plan) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = plan.start.position.step + 1  # what an earlier process wrote beyond it is done again
        self.writer = SummaryWriter(str(plan.proj_dir / "tensorboard"), purge_step=first if first > 1 else None)

    def step(self, record: dict[str, Any]) -> None:
        numbers = {key: value for key, value in record.items() if key not in SKIPPED and isinstance(value, (int, float))}
        numbers |= {f"grad_norms/{part}": norm for part, norm in (record["grad_norms"] or {}).items()}
        self._add(record["step"], numbers)

    def validation(self, record: dict[str, Any]) -> None:
        self._add(record["step"], {"val_loss": record["val_loss"]})

    def _add(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)

    def close(self) -> None:
        self.writer.close()
