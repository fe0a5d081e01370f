"""Numbers of every step, from device to logs without making the device wait."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from ..checkpoint import ranks
from .flops import flops_per_token, peak_flops
from .health import Health
from .logs import Log
from .memory import resident
from .plan import Plan
from .position import Position

DRAIN_EVERY = 1.0  # seconds between two looks at a GPU's numbers; on a CPU looking costs nothing


@dataclass(frozen=True)
class _Pending:
    step: int
    samples: int
    lr: float
    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    grad_norm: torch.Tensor | float | None
    part_norms: torch.Tensor | None


class Meter:
    """Collects loss and gradient norms of every step and hands complete records to health and logs, in order, a second late at most.

    parts: names of the parts of the model whose gradient norms are told.
    Every process runs one (the mean over devices is a collective operation); only the first has logs.
    """

    def __init__(self, plan: Plan, position: Position, health: Health, parts: list[str], logs: list[Log]) -> None:
        self.plan, self.position, self.health, self.parts, self.logs = plan, position, health, parts, logs
        self.world = ranks.world_size()
        self.flops_per_token, self.peak = flops_per_token(plan.start.model, plan.config.ctx_len), peak_flops(plan.launch.device)
        self.begin = self.drained = time.monotonic()
        self.pending: list[_Pending] = []
        self.lr = 0.0

    def step(
        self,
        loss: torch.Tensor,
        terms: dict[str, torch.Tensor],
        grad_norm: torch.Tensor | float | None,
        part_norms: torch.Tensor | None,
        lr: float,
    ) -> None:
        """After an optimizer step. Collective.

        loss, terms: this process's means, on its device; in place they become means over all. part_norms: [parts].
        """
        if self.world > 1:
            for mean in (loss, *terms.values()):
                torch.distributed.all_reduce(mean)
                mean /= self.world
        self.lr = lr
        self.pending.append(_Pending(self.position.step, self.position.samples, lr, loss, terms, grad_norm, part_norms))
        if self.health.guarded or loss.device.type == "cpu" or time.monotonic() - self.drained >= DRAIN_EVERY:
            self.drain()

    def drain(self) -> None:
        """Waits for the device and writes what is pending."""
        if not self.pending:
            return
        losses, norms = _numbers([p.loss for p in self.pending]), _numbers([p.grad_norm for p in self.pending])
        known = [p.part_norms for p in self.pending if p.part_norms is not None]
        parts = (
            [{part: float(f"{norm:.5g}") for part, norm in zip(self.parts, row)} for row in torch.stack(known).tolist()]
            if known
            else [None] * len(losses)
        )
        now = time.monotonic()
        rate = len(self.pending) * self.plan.schedule.tokens_per_step / max(now - self.drained, 1e-9)
        flops = rate / self.world * self.flops_per_token
        speed = {
            "tokens_per_s": round(rate, 1),
            "tflops": float(f"{flops / 1e12:.4g}"),
            "mfu": round(flops / self.peak, 4) if self.peak else None,
        }
        shared = speed | {"seconds": round(now - self.begin, 3), "memory_mb": memory_mb(self.plan.launch.device)}
        for p, loss, norm, by_part in zip(self.pending, losses, norms, parts, strict=True):
            found = self.health.judge(p.step, p.samples, loss, norm, by_part)
            if math.isfinite(loss):
                self.position.epoch_loss += loss
                self.position.epoch_steps += 1
            record = {
                "step": p.step,
                "tokens": p.samples * self.plan.config.ctx_len,
                "loss": loss,
                "lr": p.lr,
                "grad_norm": norm,
                "grad_norms": by_part,
            }
            record |= {name: float(value) for name, value in p.terms.items()}
            for log in self.logs:
                log.step(record | shared | found)
        self.pending.clear()
        self.drained = now

    def close_mini_epoch(self, number: int) -> None:
        self.drain()
        loss = self.position.close_mini_epoch()
        for log in self.logs:
            log.mini_epoch(number, loss, self.lr)

    def validated(self, loss: float) -> None:
        self.drain()
        for log in self.logs:
            log.validation({"step": self.position.step, "tokens": self.position.samples * self.plan.config.ctx_len, "val_loss": loss})
        self.drained = time.monotonic()  # its time is not training time

    def close(self) -> None:
        self.drain()
        for log in self.logs:
            log.close()


def _numbers(values: list[torch.Tensor | float | None]) -> list[float | None]:
    """From the device in one copy. DeepSpeed may have them on the host."""
    if all(isinstance(value, torch.Tensor) for value in values):
        return torch.stack([value.float().reshape(()) for value in values]).tolist()
    return [None if value is None else float(value) for value in values]


def memory_mb(device: torch.device) -> float:
    """Peak of the allocator on a GPU, the resident size of this process on a CPU; 0 where the system does not say."""
    return round((torch.cuda.max_memory_allocated() if device.type == "cuda" else resident()) / 2**20, 1)
