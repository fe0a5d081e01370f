"""The step of training as Lightning sees it: tokens -> features -> loss."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn

from ..config import TrainConfig
from ..models import LanguageModel
from ..ops.cross_entropy import head_cross_entropy
from .freeze import freeze
from .optimizer import make_optimizer


class HeadLoss(nn.Module):
    """The head's weight, shared with the model, inside the module that turns features into the loss.

    ZeRO-3 has a parameter whole only while the module that owns it runs; the loss reads the weight without calling the head.
    """

    def __init__(self, weight: nn.Parameter, chunk: int) -> None:
        super().__init__()
        self.weight = weight
        self.chunk = chunk

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """x: [B, T, C]; targets: [B, T] int64. Returns the mean loss, a scalar."""
        return head_cross_entropy(x, self.weight, targets, self.chunk)


class TrainModule(pl.LightningModule):
    """Loss, optimizer and gradient clipping; `attach` gives it its model. What happens around the steps is the Conductor's.

    step_loss: mean loss of this process's micro batches in the current optimizer step, on the device (nothing waits for it)
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.step_loss: torch.Tensor | None = None
        self._grad_norm: torch.Tensor | None = None

    def attach(self, model: LanguageModel) -> None:
        freeze(model, self.config.freeze)
        self.model = model
        self.head_loss = HeadLoss(model.head.weight, self.config.head_chunk)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor], grad_cp: bool = False) -> torch.Tensor:
        x, y = batch
        return self.head_loss(self.model.features(x, grad_cp=grad_cp), y)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch, bool(self.config.grad_cp))
        micro = self.config.accumulate_grad_batches
        part = loss.detach() / micro
        self.step_loss = part if batch_idx % micro == 0 else self.step_loss + part
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.config, self.trainer.strategy)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips by the norm over all parameters and keeps the norm. DeepSpeed does both by itself, on what it has sharded."""
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            most = self.config.grad_clip or float("inf")
            self._grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), most)

    def gradient_norm(self) -> torch.Tensor | float | None:
        """Of the last optimizer step, over all parameters and devices, before clipping; a tensor stays on its device."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return self.trainer.strategy.deepspeed_engine.get_global_grad_norm()
        return self._grad_norm
