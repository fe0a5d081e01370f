"""The loss on held-out text."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist

from .module import on_device
from .plan import Plan
from .signals import Agreement


class Validation:
    """Mean loss over val_batches batches spread evenly over the held-out data, the same samples each time and for any number of devices.

    It reads beside the training data, so their order is not touched.
    """

    def __init__(self, plan: Plan, trainer: pl.Trainer) -> None:
        self.plan, self.trainer = plan, trainer
        self.agreement = Agreement(plan.config.dist_timeout)
        self.n_batches = 0
        if plan.held_out is not None:
            self.batch = min(plan.config.micro_bsz, len(plan.held_out))
            self.n_batches = min(plan.config.val_batches, len(plan.held_out) // self.batch)
            self.stride = len(plan.held_out) // (self.n_batches * self.batch)

    def due(self, step: int, mini_epoch_ends: bool) -> bool:
        every = self.plan.config.val_every
        return step % every == 0 if every else mini_epoch_ends

    @torch.no_grad()
    def loss(self, asked: Callable[[], int]) -> tuple[float | None, int]:
        """The loss, None without held-out data; or None and the signal by which it was stopped between two batches. Collective.

        asked: the number of the signal that asks this process to stop; 0: none.
        """
        if not self.n_batches:
            return None, 0
        rank, world = self.trainer.global_rank, self.trainer.world_size
        device = self.trainer.strategy.root_device
        self.trainer.strategy.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=device)
        stop = 0
        for first in range(0, self.n_batches, world):  # every process makes as many passes: under ZeRO-3 each pass is collective
            (stop,) = self.agreement.exchange(asked())
            if stop:
                break
            number = first + rank
            ii = 1 + (min(number, self.n_batches - 1) * self.batch + np.arange(self.batch)) * self.stride
            batch = on_device(self.plan.held_out[ii], device)
            part = self.trainer.strategy.validation_step(batch, 0)
            if number < self.n_batches:
                total += part
        self.agreement.finish()
        if world > 1:
            dist.all_reduce(total)
        self.trainer.strategy.model.train()
        return (None if stop else total.item() / self.n_batches), stop
