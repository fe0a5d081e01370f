"""The step of training as Lightning sees it: tokens -> features -> loss."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import nn

from ..config import TrainConfig
from ..models import LanguageModel
from ..models.lm import Packed, Terms
from ..ops.cross_entropy import head_cross_entropy
from .freeze import freeze
from .norms import GradientNorms, ShardedNorms
from .optimizer import make_optimizer


def on_device(batch: tuple[torch.Tensor, ...], device: torch.device) -> tuple:
    """A batch of data/dataset.py.

    With --doc_reset (data/reset.py) the bounds of documents stay in the host's memory too: the last field of
    layers/packed.py's Packed.
    """
    return *(tensor.to(device, non_blocking=True) for tensor in batch), *(bounds.numpy() for bounds in batch[2:3])


class HeadLoss(nn.Module):
    """The head's weight, shared with the model, inside the module that turns features into the loss.

    ZeRO-3 has a parameter whole only while the module that owns it runs; the loss reads the weight without calling the head.
    """

    def __init__(self, weight: nn.Parameter, chunk: int) -> None:
        super().__init__()
        self.weight = weight
        self.chunk = chunk

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """x: [..., C]; targets: [...] int64. Returns the mean loss, a scalar."""
        return head_cross_entropy(x, self.weight, targets, self.chunk)


class TrainModule(pl.LightningModule):
    """Loss, optimizer and gradient clipping; `attach` gives it its model. What happens around the steps is the Conductor's.

    step_loss: mean loss of this process's micro batches in the current optimizer step, on the device (nothing waits for it)
    step_terms: likewise, what else the model has its training lower, by name and without its weight
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.step_loss: torch.Tensor | None = None
        self.step_terms: dict[str, torch.Tensor] = {}
        self._grad_norm: torch.Tensor | None = None

    def attach(self, model: LanguageModel) -> None:
        freeze(model, self.config.freeze)
        self.model = model
        self.head_loss = HeadLoss(model.head.weight, self.config.head_chunk)

    def loss(self, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, Terms]:
        """Mean cross entropy of a batch (data/dataset.py; --doc_reset: data/reset.py), and what else the model has its training lower."""
        if self.config.compile and self.config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # what the graphs have returned until now may be overwritten
        idx, targets, *places = batch
        grad_cp = bool(self.config.grad_cp)
        if places:
            packed = Packed(*places)
            x, terms = self.model.features(idx, grad_cp=grad_cp, packed=packed)[0, packed.tokens], {}
        elif self.training:
            x, terms = self.model.for_training(idx, grad_cp)
        else:
            x, terms = self.model.features(idx), {}
        return self.head_loss(x, targets), terms

    def transfer_batch_to_device(self, batch: tuple[torch.Tensor, ...], device: torch.device, dataloader_idx: int = 0) -> tuple:
        return on_device(batch, device)

    def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> torch.Tensor:
        cross_entropy, terms = self.loss(batch)
        micro = self.config.accumulate_grad_batches
        if batch_idx % micro == 0:
            self.step_loss, self.step_terms = 0.0, dict.fromkeys(terms, 0.0)
        self.step_loss = self.step_loss + cross_entropy.detach() / micro
        for name, (_, value) in terms.items():
            self.step_terms[name] = self.step_terms[name] + value.detach() / micro
        loss = sum((weight * value for weight, value in terms.values()), start=cross_entropy)
        return loss * (loss.detach() * 0 + 1)  # times 1; the gradient of a loss that is not finite is made NaN, so that the step is skipped

    def validation_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> torch.Tensor:
        return self.loss(batch)[0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.config, self.trainer.strategy)

    def watch_gradients(self) -> None:
        """Once the optimizer is complete, before the first step."""
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, DeepSpeedStrategy)
        self.norms = ShardedNorms(self.model, strategy.optimizers[0]) if sharded else GradientNorms(self.model)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips by the norm over all parameters; where that is not finite, the step about to be made will change nothing.

        The optimizer does both, from numbers on the device: nobody waits for it. DeepSpeed does all this by itself, on what it has sharded.
        """
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):
            self._grad_norm = self.norms.measure()
            self.trainer.strategy.optimizers[0].clip(self._grad_norm, self.config.grad_clip)

    def gradient_norm(self) -> torch.Tensor | float | None:
        """Of the last optimizer step, over all parameters and devices, before clipping. Collective, once a step.

        A tensor stays on its device.
        """
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            total = self.trainer.strategy.deepspeed_engine.get_global_grad_norm()
            self.norms.finish(total, self.config.grad_clip)
            return total
        return self._grad_norm
