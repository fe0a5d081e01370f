"""Where the numbers of a run go: one file each. Only the first process has logs."""

from __future__ import annotations

from datetime import datetime

from pytorch_lightning.strategies import Strategy

from ..plan import Plan
from .log import Foreign, Log
from .metrics import Metrics
from .progress import Progress
from .report import Report
from .tensorboard import TensorBoard
from .train_log import TrainLog
from .weights_and_biases import WeightsAndBiases

__all__ = ["Log", "make_logs"]


def make_logs(plan: Plan, strategy: Strategy) -> list[Log]:
    now = datetime.now()
    logs: list[Log] = [TrainLog(plan, getattr(strategy, "config", None), now), Metrics(plan, now), Report(plan.proj_dir)]
    if plan.config.wandb:
        logs.append(Foreign("wandb", lambda: WeightsAndBiases(plan, now)))
    if plan.config.tensorboard:
        logs.append(Foreign("TensorBoard", lambda: TensorBoard(plan)))
    if plan.config.enable_progress_bar:
        logs.append(Progress(plan))
    return logs
